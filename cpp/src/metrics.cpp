#include "metrics.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

namespace rx {
namespace {

// Upper edges, inclusive: 1 µs times 2^(i/16). Whole octaves are exact, which Prometheus' buckets rest on.
const std::array<double, Histogram::EDGES> &edges() {
    static const auto table = [] {
        std::array<double, Histogram::EDGES> result{};
        for (int i = 0; i < Histogram::EDGES; ++i)
            result[static_cast<std::size_t>(i)] =
                std::ldexp(1e-6 * std::pow(2.0, i % Histogram::PER_OCTAVE / double(Histogram::PER_OCTAVE)),
                           i / Histogram::PER_OCTAVE);
        return result;
    }();
    return table;
}

std::string number(double value) {
    if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
    return nlohmann::json(value).dump();  // the shortest text that is this number again
}

double seconds_since_1970() {
    return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void Histogram::record(double seconds) {
    const auto &table = edges();
    const auto index = std::lower_bound(table.begin(), table.end(), seconds) - table.begin();
    ++counts_[static_cast<std::size_t>(index)];
    ++count_;
    sum_ += seconds;
    max_ = std::max(max_, seconds);
    min_ = std::min(min_, seconds);
}

double Histogram::percentile(double q) const {
    const double rank = std::max(1.0, std::ceil(q / 100 * static_cast<double>(count_)));
    std::uint64_t seen = 0;
    for (std::size_t i = 0; i < counts_.size(); ++i) {
        seen += counts_[i];
        if (static_cast<double>(seen) < rank || !counts_[i]) continue;
        const double middle = i == 0 ? 0
                              : i < edges().size() ? std::sqrt(edges()[i - 1] * edges()[i])
                                                   : std::numeric_limits<double>::infinity();
        return std::min(std::max(middle, min_), max_);
    }
    return 0;
}

std::vector<std::pair<double, std::uint64_t>> Histogram::cumulative() const {
    std::vector<std::pair<double, std::uint64_t>> result;
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < edges().size(); ++i) {
        total += counts_[i];
        if (i % PER_OCTAVE == 0) result.emplace_back(edges()[i], total);
    }
    return result;
}

rxdeploy_latency Histogram::latency() const {
    return {count_,         sum_,           count_ ? sum_ / static_cast<double>(count_) : 0,
            percentile(50), percentile(90), percentile(99),
            percentile(99.9), max_};
}

Metrics::Metrics(Cost cost) : cost_(cost), started_(seconds_since_1970()), start_(now()) {
    state_.recent.fill({-1, 0});
}

void Metrics::count_images(std::size_t images) {
    const auto second = static_cast<std::int64_t>(now() - start_);
    auto &slot = state_.recent[static_cast<std::size_t>(second % (WINDOW + 1))];
    state_.images += images;
    if (slot.first < second) slot = {second, 0};
    slot.second += images;
}

void Metrics::record_run(std::size_t images, double seconds) {
    const std::lock_guard lock(mutex_);
    state_.runs.record(seconds);
    count_images(images);
}

void Metrics::record_enqueued(std::size_t images) {
    const std::lock_guard lock(mutex_);
    ++state_.enqueued;
    count_images(images);
}

void Metrics::record_batch(std::size_t size) {
    const std::lock_guard lock(mutex_);
    ++state_.batches[size];
}

void Metrics::record_request(double seconds) {
    const std::lock_guard lock(mutex_);
    state_.requests.record(seconds);
}

void Metrics::count_error() {
    const std::lock_guard lock(mutex_);
    ++state_.errors;
}

void Metrics::count_failed(std::size_t number) {
    const std::lock_guard lock(mutex_);
    state_.failed += number;
}

void Metrics::count_rejected() {
    const std::lock_guard lock(mutex_);
    ++state_.rejected;
}

void Metrics::count_expired() {
    const std::lock_guard lock(mutex_);
    ++state_.expired;
}

void Metrics::count_cancelled() {
    const std::lock_guard lock(mutex_);
    ++state_.cancelled;
}

void Metrics::queue_depth(std::size_t depth) {
    const std::lock_guard lock(mutex_);
    state_.depth = depth;
    state_.deepest = std::max<std::uint64_t>(state_.deepest, depth);
}

Metrics::State Metrics::state() const {
    const std::lock_guard lock(mutex_);
    return state_;
}

rxdeploy_metrics Metrics::figures(const State &s) const {
    const double uptime = now() - start_;
    const std::int64_t first = static_cast<std::int64_t>(uptime) - WINDOW;
    std::uint64_t recent = 0;
    for (const auto &[second, images] : s.recent)
        if (second >= first) recent += images;
    const double window = uptime - static_cast<double>(std::max<std::int64_t>(first, 0));
    rxdeploy_metrics m{};
    m.started = started_;
    m.uptime = uptime;
    m.images = s.images;
    m.images_per_second = uptime > 0 ? static_cast<double>(s.images) / uptime : 0;
    m.images_per_second_recent = window > 0 ? static_cast<double>(recent) / window : 0;
    m.card_flops_per_second_recent = m.images_per_second_recent * static_cast<double>(cost_.card_flops);
    m.flops_per_second_recent = m.images_per_second_recent * 2 * static_cast<double>(cost_.multiply_adds);
    m.runs = s.runs.latency();
    m.enqueued = s.enqueued;
    m.errors = s.errors;
    m.requests = s.requests.latency();
    for (const auto &[size, count] : s.batches) m.batches += count;
    m.queue_depth = s.depth;
    m.queue_depth_max = s.deepest;
    m.failed = s.failed;
    m.rejected = s.rejected;
    m.expired = s.expired;
    m.cancelled = s.cancelled;
    return m;
}

void Metrics::snapshot(rxdeploy_metrics &to) const { to = figures(state()); }

// Written piece by piece: nlohmann's destructors of nested values end the program where memory is short.
std::string Metrics::json() const {
    const State s = state();
    const rxdeploy_metrics m = figures(s);
    std::string text;
    const auto name = [&](const char *key) {
        text += std::string(text.empty() || text.back() == '{' ? "" : ",") + "\"" + key + "\":";
    };
    const auto real = [&](const char *key, double value) { name(key), text += number(value); };
    const auto count = [&](const char *key, std::uint64_t value) { name(key), text += std::to_string(value); };
    const auto latency = [&](const char *key, const rxdeploy_latency &l, const Histogram &histogram) {
        name(key), text += "{";
        count("count", l.count);
        for (const auto &[which, value] : {std::pair("sum", l.sum), {"mean", l.mean}, {"p50", l.p50}, {"p90", l.p90},
                                           {"p99", l.p99}, {"p999", l.p999}, {"max", l.max}})
            real(which, value);
        name("buckets"), text += "[";
        const char *between = "";
        for (const auto &[edge, below] : histogram.cumulative()) {
            text += between + std::string("[") + number(edge) + "," + std::to_string(below) + "]";
            between = ",";
        }
        text += "]}";
    };
    text += "{";
    real("started", m.started);
    real("uptime", m.uptime);
    count("images", m.images);
    real("images_per_second", m.images_per_second);
    real("images_per_second_recent", m.images_per_second_recent);
    name("card_flops_per_second_recent");
    text += cost_.card_flops ? number(m.card_flops_per_second_recent) : "null";
    real("flops_per_second_recent", m.flops_per_second_recent);
    latency("runs", m.runs, s.runs);
    count("enqueued", m.enqueued);
    count("errors", m.errors);
    latency("requests", m.requests, s.requests);
    name("batches"), text += "{";
    for (const auto &[size, number] : s.batches) count(std::to_string(size).c_str(), number);
    text += "}";
    for (const auto &[which, value] :
         {std::pair("queue_depth", m.queue_depth), {"queue_depth_max", m.queue_depth_max}, {"failed", m.failed},
          {"rejected", m.rejected}, {"expired", m.expired}, {"cancelled", m.cancelled}})
        count(which, value);
    return text + "}";
}

std::string Metrics::prometheus() const {
    const State s = state();
    const rxdeploy_metrics m = figures(s);
    std::string text;
    const auto head = [&](const char *name, const char *kind, const char *help) {
        text += std::string("# HELP ") + name + " " + help + "\n# TYPE " + name + " " + kind + "\n";
    };
    const auto sample = [&](const char *name, const char *kind, const char *help, double value) {
        head(name, kind, help);
        text += std::string(name) + " " + number(value) + "\n";
    };
    const auto count = [&](const char *name, const char *kind, const char *help, std::uint64_t value) {
        head(name, kind, help);
        text += std::string(name) + " " + std::to_string(value) + "\n";
    };
    const auto histogram = [&](const std::string &name, const char *help,
                               const std::vector<std::pair<double, std::uint64_t>> &buckets, double sum,
                               std::uint64_t total) {
        head(name.c_str(), "histogram", help);
        for (const auto &[edge, below] : buckets)
            text += name + "_bucket{le=\"" + number(edge) + "\"} " + std::to_string(below) + "\n";
        text += name + "_bucket{le=\"+Inf\"} " + std::to_string(total) + "\n";
        text += name + "_sum " + number(sum) + "\n" + name + "_count " + std::to_string(total) + "\n";
    };
    sample("rxdeploy_start_time_seconds", "gauge", "When the session was opened, seconds since 1970.", m.started);
    count("rxdeploy_images_total", "counter", "Images computed.", m.images);
    sample("rxdeploy_images_per_second", "gauge", "Images computed a second, over the last 10 s.",
           m.images_per_second_recent);
    if (cost_.card_flops)
        sample("rxdeploy_card_flops_per_second", "gauge", "FLOPs a second in the card's unit, over the last 10 s.",
               m.card_flops_per_second_recent);
    count("rxdeploy_enqueued_total", "counter", "Runs enqueued on a caller's stream, not timed.", m.enqueued);
    count("rxdeploy_errors_total", "counter", "Runs that failed.", m.errors);
    count("rxdeploy_queue_depth", "gauge", "Requests that wait for a batch.", m.queue_depth);
    count("rxdeploy_queue_depth_max", "gauge", "Most requests that ever waited at once.", m.queue_depth_max);
    count("rxdeploy_failed_total", "counter", "Requests that failed.", m.failed);
    count("rxdeploy_rejected_total", "counter", "Requests for which the queue had no room.", m.rejected);
    count("rxdeploy_expired_total", "counter", "Requests not started by their deadline.", m.expired);
    count("rxdeploy_cancelled_total", "counter", "Requests cancelled before they were started.", m.cancelled);
    histogram("rxdeploy_run_seconds", "Duration of one run of the engine.", s.runs.cumulative(), s.runs.sum(),
              s.runs.count());
    histogram("rxdeploy_request_seconds", "From submitting a request to its result.", s.requests.cumulative(),
              s.requests.sum(), s.requests.count());
    std::vector<std::pair<double, std::uint64_t>> sizes;
    double total = 0;
    for (std::size_t edge = 1; edge <= 1024; edge *= 2) {
        std::uint64_t below = 0;
        for (const auto &[size, number] : s.batches) below += size <= edge ? number : 0;
        sizes.emplace_back(edge, below);
    }
    for (const auto &[size, number] : s.batches) total += static_cast<double>(size * number);
    histogram("rxdeploy_batch_size", "Requests computed together in one batch.", sizes, total, m.batches);
    return text;
}

}  // namespace rx
