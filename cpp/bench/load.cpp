// load PORT PATH TYPE BODY RATE SECONDS [CONNECTIONS [SEED]]: ask a server on 127.0.0.1 at a fixed rate, open loop.
//
// POSTs the bytes of the file BODY at moments of a Poisson process that do not wait for answers; a request's time
// counts from its moment, so that one that waits for a free connection, or for this program, is not seen too short.
// One thread. Writes one JSON object; `client` is what this program itself took and cost.
#include <algorithm>
#include <arpa/inet.h>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <netinet/tcp.h>
#include <random>
#include <stdexcept>
#include <string>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr double PATIENCE = 5;  // seconds for the last answers

struct Connection {
    int socket = -1;
    double moment = 0;  // of its request
    std::size_t sent = 0;
    std::string answer;
    bool watches_room = false;  // to send the rest
};

double cpu_seconds() {
    rusage used{};
    ::getrusage(RUSAGE_SELF, &used);
    const auto seconds = [](const timeval &time) {
        return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
    };
    return seconds(used.ru_utime) + seconds(used.ru_stime);
}

int connect_to(int port) {
    const int socket = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<std::uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const int yes = 1;
    if (socket < 0 || ::connect(socket, reinterpret_cast<sockaddr *>(&address), sizeof address) ||
        ::setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes))
        throw std::runtime_error(std::string("cannot connect: ") + std::strerror(errno));
    return socket;
}

// The status of a whole answer, 0 while it is not whole.
int status_of(const std::string &answer) {
    const std::size_t head = answer.find("\r\n\r\n");
    if (head == answer.npos) return 0;
    std::size_t length = 0;
    for (std::size_t at = answer.find("\r\n"); at < head; at = answer.find("\r\n", at + 2))
        if (!::strncasecmp(answer.c_str() + at + 2, "content-length:", 15))
            length = std::strtoul(answer.c_str() + at + 17, nullptr, 10);
    return answer.size() >= head + 4 + length ? std::atoi(answer.c_str() + answer.find(' ')) : 0;
}

double percentile(const std::vector<double> &sorted, double percent) {
    if (sorted.empty()) return 0;
    const auto place = static_cast<std::size_t>(percent / 100 * static_cast<double>(sorted.size()));
    return sorted[std::min(sorted.size() - 1, place)];
}

}  // namespace

int main(int count, char **arguments) try {
    if (count < 7)
        return std::fprintf(stderr, "usage: load PORT PATH TYPE BODY RATE SECONDS [CONNECTIONS [SEED]]\n"), 2;
    const int port = std::atoi(arguments[1]);
    std::ifstream file(arguments[4], std::ios::binary);
    const std::string body{std::istreambuf_iterator<char>(file), {}};
    const double rate = std::atof(arguments[5]), seconds = std::atof(arguments[6]);
    std::vector<Connection> connections(static_cast<std::size_t>(count > 7 ? std::atoi(arguments[7]) : 64));
    std::mt19937_64 random(static_cast<std::uint64_t>(count > 8 ? std::atoi(arguments[8]) : 0));
    std::exponential_distribution<double> gap(rate);
    const std::string request = "POST " + std::string(arguments[2]) + " HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: " +
                                arguments[3] + "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;

    const int watch = ::epoll_create1(0);
    std::vector<Connection *> idle;
    for (Connection &connection : connections) {
        connection.socket = connect_to(port);
        epoll_event event{EPOLLIN, {&connection}};
        ::epoll_ctl(watch, EPOLL_CTL_ADD, connection.socket, &event);
        idle.push_back(&connection);
    }

    std::deque<double> waiting;  // moments of requests for which there was no connection
    std::vector<double> times, late;
    std::size_t offered = 0, others = 0, busy = 0;
    bool broken = false;
    std::vector<char> buffer(65536);
    const auto begin = Clock::now();
    const auto now = [&] { return std::chrono::duration<double>(Clock::now() - begin).count(); };
    const double cpu = cpu_seconds();

    const auto push = [&](Connection &connection) {  // as much of the request as goes
        while (connection.sent < request.size()) {
            const ssize_t some = ::send(connection.socket, request.data() + connection.sent,
                                        request.size() - connection.sent, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (some < 0 && errno == EAGAIN) break;
            if (some < 0) return void(broken = true);
            connection.sent += static_cast<std::size_t>(some);
        }
        const bool rest = connection.sent < request.size();
        if (rest == connection.watches_room) return;
        connection.watches_room = rest;
        epoll_event event{rest ? EPOLLIN | EPOLLOUT : EPOLLIN, {&connection}};
        ::epoll_ctl(watch, EPOLL_CTL_MOD, connection.socket, &event);
    };
    const auto start = [&](double moment) {
        Connection &connection = *idle.back();
        idle.pop_back();
        connection.moment = moment;
        connection.sent = 0;
        connection.answer.clear();
        ++busy;
        push(connection);
    };

    double next = gap(random), last = 0;
    while (!broken && (next < seconds || busy || !waiting.empty()) && now() < seconds + PATIENCE) {
        for (; next < seconds && next <= now(); next += gap(random)) {
            ++offered;
            if (!idle.empty()) late.push_back(now() - next);
            waiting.push_back(next);
            if (!idle.empty()) {
                start(waiting.front());
                waiting.pop_front();
            }
        }
        const double rest = std::max(0.0, std::min(next < seconds ? next - now() : 0.1, 0.1));
        const timespec limit{0, static_cast<long>(rest * 1e9)};
        epoll_event events[64];
        const int found = ::epoll_pwait2(watch, events, 64, &limit, nullptr);
        for (int i = 0; i < found; ++i) {
            Connection &connection = *static_cast<Connection *>(events[i].data.ptr);
            if (events[i].events & EPOLLOUT) push(connection);
            if (!(events[i].events & ~static_cast<unsigned>(EPOLLOUT))) continue;
            const ssize_t some = ::recv(connection.socket, buffer.data(), buffer.size(), MSG_DONTWAIT);
            if (some <= 0) {
                broken = broken || some == 0 || errno != EAGAIN;
                continue;
            }
            connection.answer.append(buffer.data(), static_cast<std::size_t>(some));
            const int status = status_of(connection.answer);
            if (!status) continue;
            last = now();
            if (status == 200)
                times.push_back(last - connection.moment);
            else
                ++others;
            --busy;
            idle.push_back(&connection);
            if (!waiting.empty()) {
                start(waiting.front());
                waiting.pop_front();
            }
        }
    }
    if (broken) throw std::runtime_error("the server closed a connection");

    const double used = cpu_seconds() - cpu;
    std::sort(times.begin(), times.end());
    std::sort(late.begin(), late.end());
    const double ended = std::max(last, seconds);
    std::printf("{\"offered\": %zu, \"answered\": %zu, \"other_statuses\": %zu, \"unanswered\": %zu, "
                "\"answers_per_second\": %.3f, \"p50_ms\": %.4f, \"p90_ms\": %.4f, \"p99_ms\": %.4f, "
                "\"max_ms\": %.4f, ",
                offered, times.size(), others, busy + waiting.size(), static_cast<double>(times.size()) / ended,
                1e3 * percentile(times, 50), 1e3 * percentile(times, 90), 1e3 * percentile(times, 99),
                1e3 * percentile(times, 100));
    std::printf("\"client\": {\"late_p99_ms\": %.4f, \"cpu_us_a_request\": %.3f, \"share_of_a_core\": %.4f}}\n",
                1e3 * percentile(late, 99), 1e6 * used / static_cast<double>(std::max<std::size_t>(offered, 1)),
                used / ended);
    return 0;
} catch (const std::exception &error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
}
