// What a session did, as rxdeploy/runtime/metrics.py counts it.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "rxdeploy.h"

namespace rx {

// Seconds of a clock that only goes forward.
double now();

// Durations in logarithmic buckets, 16 an octave from 1 µs to 1074 s. Not for several threads at once.
class Histogram {
  public:
    static constexpr int PER_OCTAVE = 16, OCTAVES = 30, EDGES = PER_OCTAVE * OCTAVES + 1;

    void record(double seconds);
    // The least duration that at least `q` percent do not exceed, off by half a bucket (2.2 %) at most; 0 of nothing.
    double percentile(double q) const;
    // (edge in seconds, how many durations were at most that) for every octave.
    std::vector<std::pair<double, std::uint64_t>> cumulative() const;
    rxdeploy_latency latency() const;
    std::uint64_t count() const { return count_; }
    double sum() const { return sum_; }

  private:
    std::array<std::uint64_t, EDGES + 1> counts_{};
    std::uint64_t count_ = 0;
    double sum_ = 0, max_ = 0, min_ = std::numeric_limits<double>::infinity();
};

// What an image costs, by the model card and as counted.
struct Cost {
    std::uint64_t card_flops = 0;  // 0: the card says none
    std::uint64_t multiply_adds = 0;
};

class Metrics {
  public:
    explicit Metrics(Cost cost);

    void record_run(std::size_t images, double seconds);
    void record_enqueued(std::size_t images);
    void record_batch(std::size_t size);
    void record_request(double seconds);
    void count_error();
    void count_failed(std::size_t number = 1);
    void count_rejected();
    void count_expired();
    void count_cancelled();
    void queue_depth(std::size_t depth);

    void snapshot(rxdeploy_metrics &to) const;
    std::string json() const;
    std::string prometheus() const;

  private:
    static constexpr int WINDOW = 10;  // seconds, of the recent rate

    // All of it, of one moment.
    struct State {
        Histogram runs, requests;
        std::uint64_t images = 0, enqueued = 0, errors = 0, failed = 0, rejected = 0, expired = 0, cancelled = 0;
        std::uint64_t depth = 0, deepest = 0;
        std::map<std::size_t, std::uint64_t> batches;
        // Images of every second of the window and the running one, with the second they are of.
        std::array<std::pair<std::int64_t, std::uint64_t>, WINDOW + 1> recent;
    };

    void count_images(std::size_t images);
    State state() const;
    rxdeploy_metrics figures(const State &state) const;

    const Cost cost_;
    const double started_, start_;
    mutable std::mutex mutex_;
    State state_;
};

}  // namespace rx
