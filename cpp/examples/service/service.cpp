#include "service.h"

#include <charconv>
#include <cmath>
#include <cstdio>
#include <new>
#include <optional>
#include <string_view>

#include <nlohmann/json.hpp>

namespace service {
namespace {

using httplib::Request;
using httplib::Response;
using Json = nlohmann::ordered_json;

constexpr std::size_t WIDEST = 65535;  // pixels: as JPEG has it
constexpr const char *JSON = "application/json";

// A request that cannot be served, with its status.
struct Refusal {
    int status;
    std::string why;
};

std::string text(const Json &json) {
    return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

void say(Response &response, int status, const std::string &why) {
    response.status = status;
    response.set_content(text({{"error", why}}), JSON);
    if (status == 503) response.set_header("Retry-After", "1");
}

// `width` of the query, or else the header `X-Width`.
std::optional<std::string> parameter(const Request &request, const std::string &name) {
    if (request.has_param(name)) return request.get_param_value(name);
    std::string header = "X-" + name;
    for (char &c : header) c = c == '_' ? '-' : c;
    if (request.has_header(header)) return request.get_header_value(header);
    return std::nullopt;
}

std::size_t number(const Request &request, const std::string &name, std::size_t least, std::size_t most,
                   std::optional<std::size_t> otherwise) {
    const std::optional<std::string> given = parameter(request, name);
    if (!given && otherwise) return *otherwise;
    std::size_t value = 0;
    const char *end = given ? given->data() + given->size() : nullptr;
    const auto [stopped, error] = given ? std::from_chars(given->data(), end, value) : std::from_chars_result{};
    if (!given || given->empty() || error != std::errc() || stopped != end || value < least || value > most)
        throw Refusal{400, name + (given ? " is not" : " is missing: give") + " a whole number from " +
                               std::to_string(least) + " to " + std::to_string(most)};
    return value;
}

const std::map<std::string, std::pair<rxdeploy_pixels, std::size_t>> LAYOUTS = {  // name: layout, bytes a pixel
    {"rgb", {RXDEPLOY_RGB, 3}},   {"bgr", {RXDEPLOY_BGR, 3}},   {"rgba", {RXDEPLOY_RGBA, 4}},
    {"bgra", {RXDEPLOY_BGRA, 4}}, {"grey", {RXDEPLOY_GREY, 1}}, {"gray", {RXDEPLOY_GREY, 1}},
};

rxdeploy::Frame frame_of(const Request &request, const std::string &body, std::size_t max_pixels) {
    const std::size_t width = number(request, "width", 1, WIDEST, std::nullopt);
    const std::size_t height = number(request, "height", 1, WIDEST, std::nullopt);
    const auto layout = LAYOUTS.find(parameter(request, "format").value_or("rgb"));
    if (layout == LAYOUTS.end()) throw Refusal{400, "format is none of rgb, bgr, rgba, bgra and grey"};
    if (width * height > max_pixels)
        throw Refusal{400, "the frame has " + std::to_string(width) + " x " + std::to_string(height) +
                               " pixels, more than the " + std::to_string(max_pixels) +
                               " allowed; scale it down first"};
    const auto [pixels, bytes] = layout->second;
    const std::size_t row = width * bytes, stride = number(request, "stride", row, std::size_t{1} << 30, row);
    const std::size_t least = stride * (height - 1) + row, most = stride * height;
    if (body.size() < least || body.size() > most)
        throw Refusal{400, "the body has " + std::to_string(body.size()) + " bytes, and " + std::to_string(height) +
                               " rows of " + std::to_string(stride) + " bytes have " + std::to_string(most)};
    return {reinterpret_cast<const std::uint8_t *>(body.data()), width, height, static_cast<std::ptrdiff_t>(stride),
            pixels};
}

// The media type, without parameters.
std::string content_type(const Request &request) {
    const std::string whole = request.get_header_value("Content-Type");
    return whole.substr(0, whole.find_first_of("; "));
}

}  // namespace

void Service::attach(HttpServer &server) {
    server.set_pre_routing_handler([this](const Request &request, Response &response) {
        if (!refuses(request, response)) return HttpServer::HandlerResponse::Unhandled;
        HttpServer::close_after_answer();  // a body may follow
        return HttpServer::HandlerResponse::Handled;
    });
    server.set_expect_100_continue_handler([this](const Request &request, Response &response) {
        if (!refuses(request, response)) return 100;
        HttpServer::close_after_answer();
        return response.status;
    });
    server.Post("/classify", [this](const Request &request, Response &response, const httplib::ContentReader &read) {
        classify(request, response, read);
    });
    server.Get("/metrics", [this](const Request &, Response &response) {
        response.set_content(metrics(), "text/plain; version=0.0.4; charset=utf-8");
    });
    server.Get("/health", [this, &server](const Request &, Response &response) {
        response.status = server.draining() ? 503 : 200;
        const Json health = {{"status", server.draining() ? "draining" : "ok"},
                             {"model", session_.model()},
                             {"precision", session_.precision()},
                             {"ran_on", session_.description()}};
        response.set_content(text(health), JSON);
    });
    server.set_error_handler([](const Request &, Response &response) {
        if (!response.body.empty()) return;
        say(response, response.status, "this is no HTTP request that the service understands");  // httplib's refusals
        HttpServer::close_after_answer();
    });
    server.set_post_routing_handler([&server](const Request &, Response &response) {
        response.headers.erase("Keep-Alive");
        if (server.draining()) HttpServer::close_after_answer();
        if (!HttpServer::closes_after_answer()) return;
        response.headers.erase("Connection");
        response.set_header("Connection", "close");
    });
    server.set_logger([this](const Request &, const Response &response) {
        const std::lock_guard lock(answered_mutex_);
        ++answered_[response.status];
    });
}

// What can be refused by its head alone. httplib limits only bodies that say their length, and takes none for endless.
bool Service::refuses(const Request &request, Response &response) const {
    const bool classifies = request.path == "/classify";
    const auto refuse = [&](int status, const std::string &why) {
        say(response, status, why);
        return true;
    };
    if (!classifies && request.path != "/metrics" && request.path != "/health")
        return refuse(404, "there are POST /classify, GET /metrics and GET /health");
    if (classifies ? request.method != "POST" : request.method != "GET" && request.method != "HEAD") {
        response.set_header("Allow", classifies ? "POST" : "GET, HEAD");
        return refuse(405, request.path + " is for " + (classifies ? "POST" : "GET"));
    }
    const bool chunked = request.has_header("Transfer-Encoding"), sized = request.has_header("Content-Length");
    if (!classifies) return (chunked || sized) && refuse(400, request.path + " takes no body");
    if (chunked ? sized || request.get_header_value("Transfer-Encoding") != "chunked"
                : request.get_header_value_count("Content-Length") > 1)
        return refuse(400, "the length of the body is said in two ways, or in none that is known");
    if (!chunked && !sized) return refuse(411, "the body has no Content-Length");
    if (request.has_header("Content-Encoding")) return refuse(415, "the body is to be sent without Content-Encoding");
    const std::string type = content_type(request);
    if (type != "image/jpeg" && type != "application/octet-stream")
        return refuse(415, "Content-Type is neither image/jpeg nor application/octet-stream");
    if (chunked) return false;
    const std::string length = request.get_header_value("Content-Length");
    std::size_t bytes = 0;
    const auto [stopped, error] = std::from_chars(length.data(), length.data() + length.size(), bytes);
    if (error == std::errc::invalid_argument || stopped != length.data() + length.size())
        return refuse(400, "Content-Length is no number");
    if (error != std::errc() || bytes > limits_.max_body)
        return refuse(413, "the body is larger than the " + std::to_string(limits_.max_body) + " bytes allowed");
    return false;
}

bool Service::enter() {
    if (++inside_ <= limits_.queue) return true;
    --inside_;
    return false;
}

void Service::leave() { --inside_; }

void Service::classify(const Request &request, Response &response, const httplib::ContentReader &read) {
    const auto began = Clock::now();
    const bool room = enter();
    struct Leave {
        Service *service;
        ~Leave() {
            if (service) service->leave();
        }
    } const leaves{room ? this : nullptr};
    const std::string too_large = "the body is larger than the " + std::to_string(limits_.max_body) + " bytes allowed";
    // Where there is no room the body is read and dropped, so that the connection can go on.
    std::string body;
    std::size_t bytes = 0;
    const bool complete = read([&](const char *data, std::size_t size) {
        if ((bytes += size) > limits_.max_body) return false;
        if (room) body.append(data, size);
        return true;
    });
    if (!complete) {
        HttpServer::close_after_answer();
        if (bytes > limits_.max_body)
            return say(response, 413, too_large);
        return say(response, 400, "the body ended early, came too slowly, or is not chunked as it says");
    }
    if (!room) return say(response, 503, std::to_string(limits_.queue) + " requests are on their way; send it later");
    try {
        const std::size_t k = number(request, "k", 1, 1'000'000, 5);
        const std::size_t milliseconds = number(request, "deadline_ms", 1, 86'400'000, 0);
        const double deadline = milliseconds ? static_cast<double>(milliseconds) / 1000 : limits_.deadline_s;
        const std::vector<std::uint8_t> image = image_of(request, body);
        rxdeploy::SubmitOptions how;
        how.deadline_s = deadline - std::chrono::duration<double>(Clock::now() - began).count();
        if (how.deadline_s <= 0) return say(response, 504, "the deadline passed while the image was decoded");
        response.set_content(answer(session_.submit(image, how).get(), k), JSON);
        response.status = 200;
    } catch (const Refusal &refusal) {
        say(response, refusal.status, refusal.why);
    } catch (const BadImage &error) {
        say(response, 400, error.what());
    } catch (const rxdeploy::InputError &error) {
        say(response, 400, error.what());
    } catch (const rxdeploy::DeadlineExceeded &error) {
        say(response, 504, error.what());
    } catch (const rxdeploy::Rejected &error) {
        say(response, 503, error.what());
    } catch (const rxdeploy::Closed &error) {
        say(response, 503, error.what());
    } catch (const std::bad_alloc &) {
        say(response, 503, "there is not enough memory for the image now; send it later");
    } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        say(response, 500, error.what());
    }
}

// Decoded and resized, a few at a time: more would share the cores, wait longer, and hold their pixels meanwhile.
std::vector<std::uint8_t> Service::image_of(const Request &request, const std::string &body) {
    {
        std::unique_lock lock(turns_mutex_);
        turn_.wait(lock, [&] { return decoding_ < limits_.decoders; });
        ++decoding_;
    }
    struct Done {
        Service &service;
        ~Done() {
            {
                const std::lock_guard lock(service.turns_mutex_);
                --service.decoding_;
            }
            service.turn_.notify_one();
        }
    } const done{*this};
    if (content_type(request) != "image/jpeg") return session_.preprocess(frame_of(request, body, limits_.max_pixels));
    const Picture picture =
        decode_jpeg(reinterpret_cast<const std::uint8_t *>(body.data()), body.size(), limits_.max_pixels);
    return session_.preprocess({picture.pixels.data(), picture.width, picture.height, 0, picture.layout});
}

// As `rxdeploy classify --json` has it of one image.
std::string Service::answer(const std::vector<float> &logits, std::size_t k) const {
    Json predictions = Json::array();
    for (const rxdeploy::Prediction &p : session_.top(logits, k)) {
        const char *label = rxdeploy_label(session_.handle(), p.index);
        predictions.push_back({{"index", p.index},
                               {"label", label ? Json(label) : Json(nullptr)},
                               {"probability", p.probability},
                               {"logit", static_cast<double>(p.logit)}});
    }
    return text({{"predictions", predictions}});
}

std::string Service::metrics() const {
    std::string text = session_.metrics_prometheus();
    text += "# HELP rxdeploy_http_answers_total Answers of the service, by HTTP status.\n"
            "# TYPE rxdeploy_http_answers_total counter\n";
    const std::lock_guard lock(answered_mutex_);
    for (const auto &[status, count] : answered_)
        text += "rxdeploy_http_answers_total{status=\"" + std::to_string(status) + "\"} " + std::to_string(count) +
                "\n";
    return text + "# HELP rxdeploy_http_requests_inside Requests of /classify on their way.\n"
                  "# TYPE rxdeploy_http_requests_inside gauge\n"
                  "rxdeploy_http_requests_inside " + std::to_string(inside_.load()) + "\n";
}

}  // namespace service
