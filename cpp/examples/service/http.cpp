#include "http.h"

#include <algorithm>
#include <arpa/inet.h>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <memory>
#include <netinet/in.h>
#include <poll.h>
#include <stdexcept>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

namespace service {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int IDLE_S = 75;          // a connection without a request is kept so long
constexpr std::size_t TURNED = 64;  // connections that wait to be told 503; more are just closed

constexpr const char *FULL_BODY = "{\"error\":\"all connections are taken; send it later\"}\n";

// Wait until `events` of `socket` or, where given, `wake`; false when neither came by `until`.
bool ready(int socket, short events, Clock::time_point until, int wake = -1) {
    std::array<pollfd, 2> watched{{{socket, events, 0}, {wake, POLLIN, 0}}};
    while (true) {
        const auto rest = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
        const int found = ::poll(watched.data(), wake < 0 ? 1 : 2, static_cast<int>(std::max<long long>(rest, 0)));
        if (found >= 0) return found > 0;
        if (errno != EINTR) return false;
    }
}

bool readable(int socket) {
    return ready(socket, POLLIN, Clock::now());
}

// Say that no more comes, read what the client still sends, a second at most, and close: at a close with unread data
// TCP takes back what the client has not read yet.
void linger(int socket) {
    ::shutdown(socket, SHUT_WR);
    std::array<char, 65536> lost;
    const auto until = Clock::now() + std::chrono::seconds(1);
    while (ready(socket, POLLIN, until) && ::recv(socket, lost.data(), lost.size(), 0) > 0 && Clock::now() < until) {}
    ::close(socket);
}

void endpoint(int (*get)(int, sockaddr *, socklen_t *), int socket, std::string &ip, int &port) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    std::array<char, INET6_ADDRSTRLEN> text{};
    if (get(socket, reinterpret_cast<sockaddr *>(&address), &size)) return;
    const auto *four = reinterpret_cast<sockaddr_in *>(&address);
    const auto *six = reinterpret_cast<sockaddr_in6 *>(&address);
    const bool is_six = address.ss_family == AF_INET6;
    ::inet_ntop(address.ss_family, is_six ? static_cast<const void *>(&six->sin6_addr) : &four->sin_addr, text.data(),
                text.size());
    ip = text.data();
    port = ntohs(is_six ? six->sin6_port : four->sin_port);
}

// A connection as httplib reads and writes it. What was read too much is kept for the next request.
class Connection final : public httplib::Stream {
  public:
    Connection(int socket, int wake, std::chrono::seconds timeout) : socket_(socket), wake_(wake), timeout_(timeout) {}

    // Wait for the first byte of a request; its time begins. False: none came, or the server ends.
    bool next() {
        close_after_answer = false;
        if (begin_ == end_) {
            if (!ready(socket_, POLLIN, Clock::now() + std::chrono::seconds(IDLE_S), wake_)) return false;
            if (!readable(socket_)) return false;
        }
        until_ = Clock::now() + timeout_;
        return true;
    }

    bool is_readable() const override { return begin_ < end_ || ready(socket_, POLLIN, until_); }
    bool is_writable() const override { return true; }

    ssize_t read(char *to, std::size_t size) override {
        if (begin_ == end_) {
            if (!flush() || !ready(socket_, POLLIN, until_)) return -1;
            const ssize_t found = ::recv(socket_, buffer_.data(), buffer_.size(), 0);
            if (found <= 0) return found;
            begin_ = 0;
            end_ = static_cast<std::size_t>(found);
        }
        const std::size_t some = std::min(size, end_ - begin_);
        std::memcpy(to, buffer_.data() + begin_, some);
        begin_ += some;
        return static_cast<ssize_t>(some);
    }

    // Kept until `flush`: httplib writes head and body one after the other, and they fit in one packet.
    ssize_t write(const char *from, std::size_t size) override {
        answer_.append(from, size);
        return static_cast<ssize_t>(size);
    }

    bool flush() {
        std::size_t sent = 0;
        const auto until = Clock::now() + timeout_;
        while (sent < answer_.size()) {
            if (!ready(socket_, POLLOUT, until)) return false;
            const ssize_t some = ::send(socket_, answer_.data() + sent, answer_.size() - sent, MSG_NOSIGNAL);
            if (some < 0) return false;
            sent += static_cast<std::size_t>(some);
        }
        answer_.clear();
        return true;
    }

    void get_remote_ip_and_port(std::string &ip, int &port) const override {
        endpoint(::getpeername, socket_, ip, port);
    }
    void get_local_ip_and_port(std::string &ip, int &port) const override {
        endpoint(::getsockname, socket_, ip, port);
    }
    socket_t socket() const override { return 0; }  // httplib only compares it with select's limit, and refuses above

    static thread_local bool close_after_answer;

  private:
    const int socket_, wake_;
    const std::chrono::seconds timeout_;
    Clock::time_point until_;
    std::array<char, 16384> buffer_;
    std::size_t begin_ = 0, end_ = 0;  // what of it was not taken yet
    std::string answer_;
};

thread_local bool Connection::close_after_answer = false;
// What this thread does with a connection that it is given.
enum class Part { serves, tells_full, closes };
thread_local Part part = Part::serves;

void tell_full(int socket) {
    const std::string body = FULL_BODY;
    const std::string head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
                             "Connection: close\r\nContent-Length: ";
    const std::string answer = head + std::to_string(body.size()) + "\r\n\r\n" + body;
    ::send(socket, answer.data(), answer.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
}

// A thread for each connection that is served, and one that turns the others away.
class Connections final : public httplib::TaskQueue {
  public:
    explicit Connections(std::size_t most) : most_(most) {
        for (std::size_t i = 0; i < most; ++i) threads_.emplace_back([this] { work(served_, Part::serves); });
        threads_.emplace_back([this] { work(refused_, Part::tells_full); });
    }

    void enqueue(std::function<void()> connection) override {
        std::unique_lock lock(mutex_);
        if (busy_ < most_) {
            ++busy_;
            served_.put(std::move(connection));
        } else if (refused_.waiting.size() < TURNED) {
            refused_.put(std::move(connection));
        } else {
            lock.unlock();
            part = Part::closes;
            connection();
        }
    }

    void shutdown() override {
        {
            const std::lock_guard lock(mutex_);
            ends_ = true;
        }
        served_.changed.notify_all();
        refused_.changed.notify_all();
        for (std::thread &thread : threads_) thread.join();
    }

  private:
    struct Queue {
        std::deque<std::function<void()>> waiting;
        std::condition_variable changed;
        void put(std::function<void()> connection) {
            waiting.push_back(std::move(connection));
            changed.notify_one();  // of hundreds of threads
        }
    };

    void work(Queue &queue, Part of_this_thread) {
        part = of_this_thread;
        std::unique_lock lock(mutex_);
        while (true) {
            queue.changed.wait(lock, [&] { return ends_ || !queue.waiting.empty(); });
            if (queue.waiting.empty()) return;
            const std::function<void()> connection = std::move(queue.waiting.front());
            queue.waiting.pop_front();
            lock.unlock();
            connection();
            lock.lock();
            if (part == Part::serves) --busy_;
        }
    }

    const std::size_t most_;
    std::mutex mutex_;  // of all that follows
    Queue served_, refused_;
    std::size_t busy_ = 0;  // connections that have a thread, or are about to
    bool ends_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace

HttpServer::HttpServer(std::size_t connections, int timeout_s)
    : timeout_s_(timeout_s), wake_(::eventfd(0, EFD_CLOEXEC)) {
    if (wake_ < 0) throw std::runtime_error(std::string("no eventfd: ") + std::strerror(errno));
    new_task_queue = [connections] { return new Connections(connections); };
    set_tcp_nodelay(true);
    // Not httplib's SO_REUSEPORT, with which a second server would silently share the port.
    set_socket_options([](socket_t socket) {
        const int yes = 1;
        ::setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    });
}

HttpServer::~HttpServer() { ::close(wake_); }

int HttpServer::bind(const std::string &host, int port) {
    if (port == 0)
        port = bind_to_any_port(host);
    else if (!bind_to_port(host, port))
        port = -1;
    // Again, with a longer backlog than httplib's 5: connections that come together would be asked to come back.
    if (port < 0 || ::listen(svr_sock_, SOMAXCONN))
        throw std::runtime_error("cannot listen on " + host + ": " + std::strerror(errno) + "; is the port taken?");
    return port;
}

void HttpServer::finish() {
    draining_ = true;
    while (!is_running()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    // Closing it would reset the connections that nobody has taken yet.
    for (int i = 0; i < 1000 && readable(svr_sock_); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    stop();
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(wake_, &one, sizeof one);
}

bool HttpServer::process_and_close_socket(socket_t socket) {
    if (part == Part::closes) return ::close(socket) == 0;
    if (part == Part::tells_full) {
        tell_full(socket);
    } else {
        Connection connection(socket, wake_, std::chrono::seconds(timeout_s_));
        while (connection.next()) {
            bool closed = false;
            // A Range is for files; httplib would cut the answer.
            const auto without_range = [](httplib::Request &request) { request.ranges.clear(); };
            const bool answered = process_request(connection, false, closed, without_range);
            // Only what said so is closed: the client may send the next request as soon as it has an answer.
            if (!connection.flush() || !answered || closed || Connection::close_after_answer) break;
        }
    }
    linger(socket);
    return true;
}

void HttpServer::close_after_answer() { Connection::close_after_answer = true; }

bool HttpServer::closes_after_answer() { return Connection::close_after_answer; }

}  // namespace service
