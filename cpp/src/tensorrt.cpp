#include "tensorrt.h"

#include "driver.h"

namespace rx {

#ifndef RXDEPLOY_HAS_TENSORRT
const char *tensorrt_version() { return nullptr; }

std::shared_ptr<Engine> open_plan(const Bundle &, const std::string &, int) {
    lacks("this library was compiled without TensorRT (cmake -DRXDEPLOY_TENSORRT_ROOT=...)");
}
#endif

std::shared_ptr<Engine> open_tensorrt(const Bundle &bundle, const std::string &library, int ordinal) {
    const Manifest &m = bundle.manifest;
    if (!m.plan || !m.files.count(PLAN))
        lacks("the bundle has no plan; `" + m.command + "` with TensorRT installed makes one");
    if (m.plan->strip_plan)
        lacks("the plan has no weights (it was built with --strip-plan), and rxdeploy does not refit plans; build it "
              "without that option");
    if (!tensorrt_version()) return open_plan(bundle, library, ordinal);
    // Creating TensorRT's runtime without a driver crashes the process: look first.
    const Driver &driver = find_driver();
    if (!driver.problem.empty()) lacks(driver.problem);
    if (ordinal < 0 || ordinal >= driver.gpus)
        lacks("there is no GPU number " + std::to_string(ordinal) + ": the driver has " + std::to_string(driver.gpus));
    return open_plan(bundle, library, ordinal);
}

}  // namespace rx
