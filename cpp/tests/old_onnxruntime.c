/* Stands for an ONNX Runtime that is older than the headers: it says so, and must not be asked for an API. */
#include <stdlib.h>

typedef struct {
    const void *(*get_api)(unsigned version);
    const char *(*get_version)(void);
} Base;

static const void *get_api(unsigned version) {
    (void)version;
    abort();
}

static const char *get_version(void) { return "1.2.0"; }

const Base *OrtGetApiBase(void);
const Base *OrtGetApiBase(void) {
    static const Base base = {get_api, get_version};
    return &base;
}
