#include "metrics.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>
#include <vector>

namespace rx {
namespace {

TEST(Histogram, PercentilesAreWithinTwoPercent) {
    std::mt19937_64 random(1);
    std::lognormal_distribution<double> draw(-5, 2);
    Histogram histogram;
    std::vector<double> values;
    for (int i = 0; i < 20000; ++i) {
        values.push_back(std::clamp(draw(random), 2e-6, 500.0));
        histogram.record(values.back());
    }
    std::sort(values.begin(), values.end());
    for (const double q : {1.0, 50.0, 90.0, 99.0, 99.9}) {
        const auto rank = static_cast<std::size_t>(std::ceil(q / 100 * 20000));
        EXPECT_NEAR(histogram.percentile(q) / values[rank - 1], 1, 0.022) << q;
    }
    EXPECT_EQ(histogram.latency().max, values.back());
}

TEST(Histogram, EdgesAndNothing) {
    Histogram histogram;
    EXPECT_EQ(histogram.percentile(50), 0);
    EXPECT_EQ(histogram.latency().mean, 0);
    histogram.record(0);
    histogram.record(1e9);
    histogram.record(2e-6);  // an edge is of the bucket below
    EXPECT_EQ(histogram.percentile(0), 0);
    EXPECT_EQ(histogram.percentile(100), 1e9);
    const auto octaves = histogram.cumulative();
    EXPECT_EQ(octaves[0], (std::pair<double, std::uint64_t>(1e-6, 1)));
    EXPECT_EQ(octaves[1], (std::pair<double, std::uint64_t>(2e-6, 2)));
    EXPECT_EQ(octaves.back().second, 2u);
    EXPECT_EQ(octaves.size(), 31u);
}

TEST(Metrics, RatesAreImagesTimesCost) {
    Metrics metrics({1000, 400});
    metrics.record_run(8, 0.5);
    metrics.record_enqueued(2);
    metrics.count_error();
    rxdeploy_metrics m{};
    metrics.snapshot(m);
    EXPECT_EQ(m.images, 10u);
    EXPECT_EQ(m.runs.count, 1u);
    EXPECT_EQ(m.runs.p50, 0.5);
    EXPECT_EQ(m.enqueued, 1u);
    EXPECT_EQ(m.errors, 1u);
    EXPECT_NEAR(m.images_per_second * m.uptime, 10, 1e-6);
    EXPECT_DOUBLE_EQ(m.card_flops_per_second_recent, m.images_per_second_recent * 1000);
    EXPECT_DOUBLE_EQ(m.flops_per_second_recent, m.images_per_second_recent * 800);
}

TEST(Metrics, JsonHasTheNamesOfThePythonRuntime) {
    Metrics metrics({0, 1});
    metrics.record_batch(3);
    metrics.record_batch(3);
    metrics.record_batch(1);
    metrics.record_request(0.25);
    metrics.queue_depth(5);
    metrics.queue_depth(2);
    const auto m = nlohmann::json::parse(metrics.json());
    EXPECT_EQ(m["batches"], nlohmann::json({{"1", 1}, {"3", 2}}));
    EXPECT_EQ(m["requests"]["count"], 1);
    EXPECT_EQ(m["requests"]["buckets"].size(), 31u);
    EXPECT_EQ(m["queue_depth"], 2);
    EXPECT_EQ(m["queue_depth_max"], 5);
    EXPECT_TRUE(m["card_flops_per_second_recent"].is_null());
}

TEST(Metrics, PrometheusText) {
    Metrics metrics({1, 1});
    metrics.record_batch(3);
    metrics.record_run(3, 0.25);
    const std::string text = metrics.prometheus();
    for (const char *line : {"\nrxdeploy_images_total 3\n", "\nrxdeploy_batch_size_bucket{le=\"2.0\"} 0\n",
                             "\nrxdeploy_batch_size_bucket{le=\"4.0\"} 1\n", "\nrxdeploy_batch_size_sum 3.0\n",
                             "\nrxdeploy_run_seconds_bucket{le=\"+Inf\"} 1\n", "\nrxdeploy_run_seconds_sum 0.25\n",
                             "# TYPE rxdeploy_run_seconds histogram\n"})
        EXPECT_NE(text.find(line), std::string::npos) << line;
}

TEST(Metrics, NothingIsLostBetweenThreads) {
    Metrics metrics({1, 1});
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i)
        threads.emplace_back([&] {
            for (int j = 0; j < 2000; ++j) {
                metrics.record_run(1, 1e-3);
                metrics.record_batch(static_cast<std::size_t>(j % 3));
                if (j % 100 == 0) metrics.json();
            }
        });
    for (std::thread &thread : threads) thread.join();
    rxdeploy_metrics m{};
    metrics.snapshot(m);
    EXPECT_EQ(m.images, 8000u);
    EXPECT_EQ(m.runs.count, 8000u);
    EXPECT_EQ(m.batches, 8000u);
}

}  // namespace
}  // namespace rx
