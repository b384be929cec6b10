/* Stands for an ONNX Runtime that is older than the headers (OLD): it says so, and must not be asked for an API; or for
 * one so much newer (NEW) that it has the headers' API no more. */
#include <stdlib.h>

typedef struct {
    const void *(*get_api)(unsigned version);
    const char *(*get_version)(void);
} Base;

static const void *get_api(unsigned version) {
    (void)version;
#ifdef OLD
    abort();
#else
    return NULL;
#endif
}

static const char *get_version(void) {
#ifdef OLD
    return "1.2.0";
#else
    return "2.0.0";
#endif
}

const Base *OrtGetApiBase(void);
const Base *OrtGetApiBase(void) {
    static const Base base = {get_api, get_version};
    return &base;
}
