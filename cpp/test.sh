#!/bin/sh
# Configures, builds and tests the C and C++ runtime; `make cpp-test` calls it. From anywhere:
#
#   cpp/test.sh PYTHON [PRESET...]
#
# PYTHON has rxdeploy with the extras build, cpu and dev: it makes the bundle, brings libonnxruntime.so and is what the
# C library is compared with. Presets: release, asan, tsan; all three unless named. TENSORRT=DIR compiles that backend.
set -eu
python=$1
shift
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- release asan tsan
work=$PWD/build/test
mkdir -p "$work"
headers=$(./fetch_onnxruntime_headers.sh "$PWD/build/onnxruntime")

RXDEPLOY_ONNXRUNTIME=$("$python" -c '
import glob, importlib.util, pathlib
package = pathlib.Path(importlib.util.find_spec("onnxruntime").origin).parent
print(glob.glob(str(package / "capi/libonnxruntime.so.*"))[0])')
RXDEPLOY_TEST_BUNDLE=$work/digits-fp32
export RXDEPLOY_ONNXRUNTIME RXDEPLOY_TEST_BUNDLE
"$python" -m rxdeploy build digits_resnext14_8x8d --fp32 --target onnxruntime -o "$RXDEPLOY_TEST_BUNDLE"

for preset; do
    library=$PWD/build/$preset/librxdeploy.so
    cmake --preset "$preset" -DRXDEPLOY_ONNXRUNTIME_ROOT="$headers" -DRXDEPLOY_TENSORRT_ROOT="${TENSORRT:-}"
    cmake --build --preset "$preset" --parallel "$(nproc)"
    ctest --preset "$preset" --parallel "$(nproc)"
    tests=tests/cpp/test_service.py
    [ "$preset" != release ] || tests="tests/cpp tests/signing/test_trust_in_c.py"
    # shellcheck disable=SC2086  # several names
    (cd .. && RXDEPLOY_CPP_LIBRARY=$library "$python" -m pytest $tests)
    [ -x "build/$preset/examples/service" ] ||
        echo "cpp/test.sh: the example service was NOT BUILT (libcpp-httplib-dev and libjpeg-dev are missing)"
    if [ "$preset" = release ]; then
        build/release/bench/soak "$RXDEPLOY_TEST_BUNDLE" 100000
    fi
done
[ -n "${TENSORRT:-}" ] || echo "cpp/test.sh: the TensorRT backend was NOT COMPILED (TENSORRT=DIR names its headers)"
