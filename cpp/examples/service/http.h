// cpp-httplib's server with what it leaves open: connections, time and the end are bounded.
//
// - A request is to be there whole some seconds after its first byte, however slowly it trickles.
// - At most so many connections; the next ones are told 503 at once, and closed.
// - Draining: what was begun is answered, connections are closed after their answer.
// - poll instead of select, no delay of small packets, a longer backlog, a port of one's own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <httplib.h>

namespace service {

class HttpServer : public httplib::Server {
  public:
    HttpServer(std::size_t connections, int timeout_s);
    ~HttpServer() override;

    // Take an address; port 0: a free one. The port that it is. std::runtime_error.
    int bind(const std::string &host, int port);
    // Serve until `finish`, and until all that was begun is answered. False: the listening socket failed.
    bool run() { return listen_after_bind(); }

    // From now on every connection is closed after its answer. Any thread.
    void drain() { draining_ = true; }
    bool draining() const { return draining_; }
    // Take no more connections and no more requests; `run` returns when the last answer is out. Any thread.
    void finish();

    // In a handler: close the connection after this answer, as there is a body that nobody reads.
    static void close_after_answer();
    // In a handler: whether that was said.
    static bool closes_after_answer();

  private:
    bool process_and_close_socket(socket_t socket) override;

    const int timeout_s_;
    int wake_;  // an eventfd, readable from `finish` on
    std::atomic<bool> draining_{false};
};

}  // namespace service
