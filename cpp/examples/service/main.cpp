// service BUNDLE [--port N] [...]: classify JPEG files and raw frames over HTTP/1.1. docs/cpp.md says how to call it.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>

#include <pthread.h>

#include "http.h"
#include "rxdeploy.hpp"
#include "service.h"

namespace {

constexpr const char *USAGE = R"(usage: service BUNDLE [OPTION VALUE]...
  --host ADDRESS        to listen on [127.0.0.1]
  --port N              0 is a free one, which the first line of output names [8080]
  --trusted-key FILE    serve only a bundle that this public key's owner signed; again for more keys [any bundle]
  --device NAME         auto, tensorrt, tensorrt:1, cpu [auto]
  --threads N           that compute one batch together on a CPU [as tuned, else one a core]
  --max-batch N         images computed at once [what suits the bundle]
  --max-delay-ms X      longest that a request waits for companions [2]
  --workers N           threads that compute batches [what suits]
  --queue N             requests on their way at once; the next gets 503 [256]
  --deadline-ms X       a request not started by then gets 504 [none]
  --max-body N          bytes of a request's body [16777216]
  --max-pixels N        of an image, before it is resized [50000000]
  --decoders N          images decoded and resized at once [one a core]
  --connections N       at once; the next get 503 [256]
  --timeout N           seconds for a request to arrive, and for an answer to leave [10]
  --grace X             seconds to serve on after SIGTERM, with /health at 503 [0]
)";

struct Options {
    std::string bundle, host = "127.0.0.1";
    int port = 8080, timeout_s = 10;
    double grace_s = 0;
    std::size_t connections = 256;
    service::Limits limits;
    rxdeploy::Options session;
};

double number(const std::string &text, double least, double most) {
    std::size_t used = 0;
    const double value = std::stod(text, &used);
    if (used != text.size() || !(value >= least) || !(value <= most)) throw std::invalid_argument("out of range");
    return value;
}

Options parse(int count, char **arguments) {
    Options options;
    options.limits.decoders = std::max(std::thread::hardware_concurrency(), 1U);
    const auto size = [](const std::string &text, double most = 1e12) {
        return static_cast<std::size_t>(number(text, 1, most));
    };
    const std::map<std::string, std::function<void(const std::string &)>> known = {
        {"--host", [&](const auto &text) { options.host = text; }},
        {"--port", [&](const auto &text) { options.port = static_cast<int>(number(text, 0, 65535)); }},
        {"--trusted-key",
         [&](const auto &text) {
             if (!options.session.trusted_keys) options.session.trusted_keys.emplace();
             options.session.trusted_keys->push_back(text);
         }},
        {"--device", [&](const auto &text) { options.session.device = text; }},
        {"--threads", [&](const auto &text) { options.session.threads = static_cast<int>(number(text, 1, 4096)); }},
        {"--max-batch", [&](const auto &text) { options.session.max_batch = size(text); }},
        {"--max-delay-ms", [&](const auto &text) { options.session.max_delay_ms = number(text, 0, 1e6); }},
        {"--workers", [&](const auto &text) { options.session.workers = size(text); }},
        {"--queue", [&](const auto &text) { options.limits.queue = size(text); }},
        {"--deadline-ms", [&](const auto &text) { options.limits.deadline_s = number(text, 0.001, 1e9) / 1000; }},
        {"--max-body", [&](const auto &text) { options.limits.max_body = size(text); }},
        {"--max-pixels", [&](const auto &text) { options.limits.max_pixels = size(text); }},
        {"--decoders", [&](const auto &text) { options.limits.decoders = size(text); }},
        {"--connections", [&](const auto &text) { options.connections = size(text, 4096); }},
        {"--timeout", [&](const auto &text) { options.timeout_s = static_cast<int>(number(text, 1, 3600)); }},
        {"--grace", [&](const auto &text) { options.grace_s = number(text, 0, 3600); }},
    };
    if (count < 2 || count % 2) throw std::invalid_argument(USAGE);
    options.bundle = arguments[1];
    for (int i = 2; i < count; i += 2) {
        const auto option = known.find(arguments[i]);
        if (option == known.end()) throw std::invalid_argument(std::string(arguments[i]) + " is no option\n" + USAGE);
        try {
            option->second(arguments[i + 1]);
        } catch (const std::exception &) {
            throw std::invalid_argument(std::string(arguments[i]) + ": " + arguments[i + 1] + " cannot be used");
        }
    }
    options.session.queue_size = options.limits.queue;
    options.session.reject_when_full = true;
    return options;
}

// The first signal ends it in good order, the second at once.
void end_on_signal(const sigset_t &signals, service::HttpServer &server, double grace_s) {
    int signal = 0;
    sigwait(&signals, &signal);
    std::fprintf(stderr, "%s: answering what is on its way\n", signal == SIGTERM ? "SIGTERM" : "SIGINT");
    server.drain();
    std::thread([signals] {
        int again = 0;
        sigwait(&signals, &again);
        std::_Exit(128 + again);
    }).detach();
    std::this_thread::sleep_for(std::chrono::duration<double>(grace_s));
    server.finish();
}

}  // namespace

int main(int count, char **arguments) try {
    const Options options = parse(count, arguments);
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // before there are threads, which have it from here

    service::HttpServer server(options.connections, options.timeout_s);
    const int port = server.bind(options.host, options.port);
    rxdeploy::Session session(options.bundle, options.session);
    const std::size_t one = 1;
    session.prepare({&one, 1});
    service::Service service(session, options.limits);
    service.attach(server);
    std::thread ending(end_on_signal, std::cref(signals), std::ref(server), options.grace_s);
    std::printf("http://%s:%d/classify: %s %s, %s\n", options.host.c_str(), port, session.model().c_str(),
                session.precision().c_str(), session.description().c_str());
    std::fflush(stdout);
    if (!server.run()) std::_Exit((std::fprintf(stderr, "the listening socket failed\n"), 1));
    ending.join();
    session.close();
    return 0;
} catch (const std::invalid_argument &error) {
    return std::fprintf(stderr, "%s\n", error.what()), 2;
} catch (const rxdeploy::Error &error) {
    return std::fprintf(stderr, "%s\n", error.what()), error.status() <= 3 ? error.status() : 1;
} catch (const std::exception &error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
}
