// soak BUNDLE [REQUESTS [CALLERS]]: many single requests from several callers, and what memory and logits do meanwhile.
//
// Every logit is compared with that of the first time; a caller in sixteen gives a deadline, one cancels now and then.
// Ends with 1 when a logit differs, a request is lost, or memory grew by more than 1 MiB over the second half.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "rxdeploy.hpp"

namespace {

// Resident memory of this process, bytes: Linux, /proc/self/statm, second field.
std::size_t resident() {
    std::size_t total = 0, pages = 0;
    std::ifstream("/proc/self/statm") >> total >> pages;
    return pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

constexpr std::size_t IMAGES = 16, AHEAD = 8;

}  // namespace

int main(int count, char **arguments) try {
    if (count < 2) return std::fprintf(stderr, "usage: soak BUNDLE [REQUESTS [CALLERS]]\n"), 2;
    const long requests = count > 2 ? std::atol(arguments[2]) : 100000;
    const int callers = count > 3 ? std::atoi(arguments[3]) : 4;
    rxdeploy::Options options;
    options.device = "cpu";
    options.max_batch = 1;  // another batch size may round otherwise
    rxdeploy::Session session(arguments[1], options);
    std::vector<std::vector<std::uint8_t>> images;
    std::vector<std::vector<float>> expected;
    for (std::size_t i = 0; i < IMAGES; ++i) {
        std::vector<std::uint8_t> image(session.image_bytes());
        for (std::size_t j = 0; j < image.size(); ++j)
            image[j] = static_cast<std::uint8_t>((j + i * 977) * 2654435761u >> 24);
        images.push_back(image);
        expected.push_back(session.submit(image).get());
    }

    std::atomic<long> next{0}, done{0}, cancelled{0}, wrong{0};
    const auto call = [&] {
        std::vector<std::pair<std::size_t, rxdeploy::Request>> waiting;
        const auto settle = [&] {
            for (const auto &[which, request] : waiting) try {
                    if (request.get() != expected[which]) ++wrong;
                    ++done;
                } catch (const rxdeploy::Cancelled &) {
                    ++cancelled;
                }
            waiting.clear();
        };
        for (long i = next++; i < requests; i = next++) {
            const std::size_t which = static_cast<std::size_t>(i) % IMAGES;
            rxdeploy::SubmitOptions how;
            if (i % 16 == 0) how.deadline_s = 60;
            waiting.emplace_back(which, session.submit(images[which], how));
            if (i % 64 == 5) waiting.back().second.cancel();
            if (waiting.size() == AHEAD) settle();
        }
        settle();
    };
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i) threads.emplace_back(call);
    std::size_t half = 0, most = 0;
    for (int tenth = 1; tenth <= 10; ++tenth) {
        while (done + cancelled < requests * tenth / 10) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        const std::size_t here = resident();
        std::printf("%8ld requests  %8.2f MiB\n", done + cancelled, static_cast<double>(here) / (1 << 20));
        std::fflush(stdout);
        if (tenth == 5) half = here;
        if (tenth >= 5) most = std::max(most, here);
    }
    for (std::thread &thread : threads) thread.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const rxdeploy::Metrics m = session.metrics();
    const double grown = static_cast<double>(most - half) / (1 << 20);
    std::printf("%ld done, %ld cancelled, %ld wrong, in %.1f s (%.0f a second); p50 %.2f ms, p99 %.2f ms\n",
                done.load(), cancelled.load(), wrong.load(), seconds, static_cast<double>(done) / seconds, m.requests.p50 * 1e3,
                m.requests.p99 * 1e3);
    std::printf("memory grew by %.2f MiB over the second half\n", grown);
    const bool lost = done + cancelled != requests || m.failed || m.rejected || m.expired;
    return wrong || lost || grown > 1;
} catch (const std::exception &error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
}
