// What the service answers; docs/cpp.md has it for callers.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "http.h"
#include "jpeg.h"
#include "rxdeploy.hpp"

namespace service {

struct Limits {
    std::size_t queue = 256;              // requests that are on their way at once; the next gets 503
    std::size_t decoders = 1;             // images that are decoded and resized at once
    std::size_t max_body = 16 << 20;      // bytes
    std::size_t max_pixels = 50'000'000;  // of an image, before it is resized
    double deadline_s = std::numeric_limits<double>::infinity();  // where the request says none
};

class Service {
  public:
    Service(rxdeploy::Session &session, const Limits &limits) : session_(session), limits_(limits) {}

    // Answer this server's requests. Both are to outlive its run.
    void attach(HttpServer &server);

  private:
    using Clock = std::chrono::steady_clock;

    bool refuses(const httplib::Request &request, httplib::Response &response) const;
    void classify(const httplib::Request &request, httplib::Response &response, const httplib::ContentReader &read);
    std::vector<std::uint8_t> image_of(const httplib::Request &request, const std::string &body);
    std::string answer(const std::vector<float> &logits, std::size_t k) const;
    std::string metrics() const;
    bool enter();
    void leave();

    rxdeploy::Session &session_;
    const Limits limits_;
    std::atomic<std::size_t> inside_{0};  // requests on their way
    std::mutex turns_mutex_;
    std::condition_variable turn_;
    std::size_t decoding_ = 0;
    mutable std::mutex answered_mutex_;
    std::map<int, std::size_t> answered_;  // status: answers
};

}  // namespace service
