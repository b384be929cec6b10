/* rxdeploy.h is C, and its structs are what C sees: compiled as C11 with -Wpedantic. */
#include "rxdeploy.h"

size_t abi_sizes(size_t which);

size_t abi_sizes(size_t which) {
    const size_t sizes[] = {sizeof(rxdeploy_options), sizeof(rxdeploy_submit_options), sizeof(rxdeploy_info),
                            sizeof(rxdeploy_prediction), sizeof(rxdeploy_frame), sizeof(rxdeploy_metrics)};
    return sizes[which];
}
