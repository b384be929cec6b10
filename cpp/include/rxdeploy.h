/* rxdeploy: run a bundle that `rxdeploy build` made, from C. docs/cpp.md tells how to build and link it.
 *
 * Every function that can fail returns a rxdeploy_status; what went wrong, in one sentence, is then
 * rxdeploy_last_error() of the same thread. No exception leaves the library. Text is UTF-8; a `const char *` that is
 * returned belongs to the library, and to the session it was asked of.
 *
 * A session may be used by any number of threads at once, except by rxdeploy_free, which must be the last. In a process
 * that was forked from the one that opened it, its calls and its requests' fail with RXDEPLOY_CLOSED.
 */
#ifndef RXDEPLOY_H
#define RXDEPLOY_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define RXDEPLOY_API __attribute__((visibility("default")))
#else
#define RXDEPLOY_API
#endif

/* In C an enum may hold any int; C++ has to be told that it may. */
#ifdef __cplusplus
#define RXDEPLOY_ENUM(name) enum name : int
#else
#define RXDEPLOY_ENUM(name) enum name
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes when a program compiled against an older header would not run any more; it is the number in the soname. */
#define RXDEPLOY_ABI 1

typedef RXDEPLOY_ENUM(rxdeploy_status) {
    RXDEPLOY_OK = 0,
    RXDEPLOY_CHECK_FAILED = 1,      /* something was computed, and it is wrong: a logit that is not finite */
    RXDEPLOY_INPUT_ERROR = 2,       /* what was given cannot be used: an option, a bundle, an image */
    RXDEPLOY_ENVIRONMENT_LACKS = 3, /* this machine lacks something: a library, a GPU, memory */
    RXDEPLOY_CLOSED = 4,            /* the session was closed */
    RXDEPLOY_REJECTED = 5,          /* there was no room for the request in the queue */
    RXDEPLOY_DEADLINE_EXCEEDED = 6, /* the request was not started by its deadline */
    RXDEPLOY_CANCELLED = 7,         /* the request was cancelled before it was started */
    RXDEPLOY_PENDING = 8,           /* the request is not done yet */
    RXDEPLOY_INTERNAL = 9           /* a bug of the library's */
} rxdeploy_status;

typedef struct rxdeploy_session rxdeploy_session;
typedef struct rxdeploy_request rxdeploy_request;

/* The library */

RXDEPLOY_API const char *rxdeploy_version(void); /* of rxdeploy, "0.1.0" */
RXDEPLOY_API int rxdeploy_abi(void);             /* RXDEPLOY_ABI of the library that is loaded */
/* Version of TensorRT that the backend was compiled with ("10.16.1"), NULL when it was not compiled. */
RXDEPLOY_API const char *rxdeploy_tensorrt(void);
RXDEPLOY_API const char *rxdeploy_status_name(rxdeploy_status status); /* "input error" */
/* Why the last call of this thread that failed did so; valid until the thread's next call that fails. Never NULL. */
RXDEPLOY_API const char *rxdeploy_last_error(void);

/* A session */

typedef RXDEPLOY_ENUM(rxdeploy_when_full) {
    RXDEPLOY_WAIT = 0,  /* a submit that finds the queue full waits for room */
    RXDEPLOY_REJECT = 1 /* it fails with RXDEPLOY_REJECTED */
} rxdeploy_when_full;

/* Fill it with rxdeploy_options_init, then change what you want to. */
typedef struct rxdeploy_options {
    size_t size;             /* sizeof(rxdeploy_options), as this program was compiled */
    const char *device;      /* "auto" (NULL is that), "tensorrt", "tensorrt:1" (the second GPU), "cpu" */
    const char *onnxruntime; /* path of libonnxruntime.so; NULL: RXDEPLOY_ONNXRUNTIME in the environment, else the
                                path compiled in, else the system's */
    const char *tensorrt;    /* path of TensorRT's runtime library; NULL: RXDEPLOY_TENSORRT, else by its soname */
    const char *labels;      /* text file, one class name a line, used instead of the bundle's; or NULL */
    int threads;             /* that compute one batch together on a CPU; 0: as the bundle was tuned, else one a core */
    /* For rxdeploy_submit: */
    size_t max_batch;               /* most images at once; 0: what suits the bundle */
    double max_delay_ms;            /* longest that a request waits for companions while a worker is free; 2 */
    size_t queue_size;              /* most requests waiting; 1024 */
    rxdeploy_when_full when_full;   /* RXDEPLOY_WAIT */
    size_t workers;                 /* threads that compute batches; 0: what suits bundle and machine */
    /* Files of public keys in PEM: only a bundle that one of them signed (`rxdeploy sign`) is opened. NULL and 0: any. */
    const char *const *trusted_keys;
    size_t trusted_key_count;
} rxdeploy_options;

/* `size` is sizeof(rxdeploy_options), as this program was compiled, which the macro gives: a later library may know a
 * longer struct, and writes no more than that. */
RXDEPLOY_API void rxdeploy_options_init(rxdeploy_options *options, size_t size);
#define rxdeploy_options_init(options) rxdeploy_options_init((options), sizeof(rxdeploy_options))

/* Open the bundle at `path`, check every digest, and get it ready to run. `options` may be NULL.
 * RXDEPLOY_INPUT_ERROR for a bundle that is none or was altered, RXDEPLOY_CHECK_FAILED for one that no trusted key
 * signed as it is, RXDEPLOY_ENVIRONMENT_LACKS, with the reason, for a
 * device that is not possible here. */
RXDEPLOY_API rxdeploy_status rxdeploy_open(const char *path, const rxdeploy_options *options,
                                           rxdeploy_session **session);

/* End it: what was submitted is computed (`drain`), or fails with RXDEPLOY_CLOSED (no `drain`). Calls that are running
 * end first; later ones fail with RXDEPLOY_CLOSED. Twice is no error. In a callback it returns at once. */
RXDEPLOY_API void rxdeploy_close(rxdeploy_session *session, int drain);
/* rxdeploy_close with `drain`, and free the handle. Requests stay valid. NULL is nothing. */
RXDEPLOY_API void rxdeploy_free(rxdeploy_session *session);

typedef struct rxdeploy_info {
    size_t size;            /* set it to sizeof(rxdeploy_info) before the call */
    size_t image_size;      /* pixels, height = width */
    size_t classes;
    size_t image_bytes;     /* of one uint8 image: image_size * image_size * 3 */
    size_t largest_batch;   /* that is computed at once; larger ones are split */
    int takes_float32;      /* whether the declared input is normalised float32 NCHW */
    uint64_t multiply_adds; /* of one image, counted */
    uint64_t card_flops;    /* of one image, in the model card's own unit; 0 when the card says none */
} rxdeploy_info;

RXDEPLOY_API rxdeploy_status rxdeploy_get_info(const rxdeploy_session *session, rxdeploy_info *info);
/* These are NULL only when `session` is. */
RXDEPLOY_API const char *rxdeploy_model(const rxdeploy_session *session);     /* the card's name */
RXDEPLOY_API const char *rxdeploy_precision(const rxdeploy_session *session); /* "fp32", "fp16" or "int8" */
RXDEPLOY_API const char *rxdeploy_device(const rxdeploy_session *session);    /* "cpu" or "tensorrt" */
RXDEPLOY_API const char *rxdeploy_description(const rxdeploy_session *session); /* device and library, for people */
RXDEPLOY_API const char *rxdeploy_passed_over(const rxdeploy_session *session); /* why "auto" took nothing better; "" */
/* Name of a class; NULL when it has none. */
RXDEPLOY_API const char *rxdeploy_label(const rxdeploy_session *session, size_t index);

/* Running batches. `logits` takes float32 (n, classes). A batch larger than `largest_batch` is split. */

/* uint8 RGB images (n, image_size, image_size, 3) in host memory; complete on return. RXDEPLOY_CHECK_FAILED when a
 * logit is not finite. */
RXDEPLOY_API rxdeploy_status rxdeploy_run(rxdeploy_session *session, const uint8_t *images, size_t n, float *logits);
/* The declared input of a bundle built with `--input float32`: normalised float32 (n, 3, image_size, image_size).
 * RXDEPLOY_INPUT_ERROR when a sample is not finite or beyond 65504. */
RXDEPLOY_API rxdeploy_status rxdeploy_run_float32(rxdeploy_session *session, const float *images, size_t n,
                                                  float *logits);
/* The declared input and the logits in the GPU's memory (its primary context), enqueued on `stream`, a CUstream or
 * cudaStream_t: returns when the work is enqueued. Keep the memory alive and unchanged until the stream has done it.
 * With a NULL stream it is complete on return. Only where the session's device is "tensorrt". */
RXDEPLOY_API rxdeploy_status rxdeploy_run_device(rxdeploy_session *session, const void *images, size_t n, void *logits,
                                                 void *stream);
/* Let the first real call with each of these batch sizes be as fast as the later ones. */
RXDEPLOY_API rxdeploy_status rxdeploy_prepare(rxdeploy_session *session, const size_t *sizes, size_t count);

typedef struct rxdeploy_prediction {
    size_t index;       /* of the class */
    double probability; /* softmax over all classes, in float64 */
    float logit;
} rxdeploy_prediction;

/* The `k` most probable classes of each row of `logits`, best first, equal logits in the order of the classes.
 * `predictions` has room for n * k; where k is more than there are classes, the rest of a row has index SIZE_MAX.
 * RXDEPLOY_CHECK_FAILED when a logit is not finite. */
RXDEPLOY_API rxdeploy_status rxdeploy_top(const rxdeploy_session *session, const float *logits, size_t n, size_t k,
                                          rxdeploy_prediction *predictions);

/* Images */

typedef RXDEPLOY_ENUM(rxdeploy_pixels) {
    RXDEPLOY_RGB = 0,
    RXDEPLOY_BGR = 1,
    RXDEPLOY_RGBA = 2, /* laid on white, as the Python runtime does; alpha is not premultiplied */
    RXDEPLOY_BGRA = 3,
    RXDEPLOY_GREY = 4
} rxdeploy_pixels;

typedef RXDEPLOY_ENUM(rxdeploy_interpolation) {
    RXDEPLOY_NEAREST = 0,
    RXDEPLOY_BILINEAR = 1,
    RXDEPLOY_BICUBIC = 2,
    RXDEPLOY_LANCZOS = 3
} rxdeploy_interpolation;

typedef struct rxdeploy_frame {
    const uint8_t *data; /* first pixel of the top row; 8 bits a channel */
    size_t width;        /* pixels */
    size_t height;
    ptrdiff_t stride;    /* bytes from one row to the next, negative when rows go upwards in memory; 0: no padding */
    rxdeploy_pixels pixels;
} rxdeploy_frame;

/* A decoded frame, upright, to one image for rxdeploy_run and rxdeploy_submit, as the model's evaluation transform has
 * it: shorter side resized with antialiasing, then the central square. Bit for bit what the Pillow gives that the
 * bundle was made with (from version 13 on, tall images are rounded otherwise). */
RXDEPLOY_API rxdeploy_status rxdeploy_preprocess(const rxdeploy_session *session, const rxdeploy_frame *frame,
                                                 uint8_t *image);
/* The same without a session; `image` takes image_size * image_size * 3 bytes. `pillow` is the major version of Pillow
 * that is meant, 0 for the newest that is known here. */
RXDEPLOY_API rxdeploy_status rxdeploy_transform(const rxdeploy_frame *frame, size_t image_size, double crop_pct,
                                                rxdeploy_interpolation interpolation, int pillow, uint8_t *image);

/* Single requests, computed together with those of other callers */

/* Called once for each request, on a thread of the library's or in rxdeploy_request_cancel: `status`, and then the
 * logits, or NULL and a message. Nothing of it is valid afterwards. It may be called before rxdeploy_submit returns;
 * it must not throw. While it runs, its thread computes nothing. */
typedef void (*rxdeploy_callback)(void *user, rxdeploy_status status, const float *logits, size_t classes,
                                  const char *message);

/* Fill it with rxdeploy_submit_options_init, then change what you want to. */
typedef struct rxdeploy_submit_options {
    size_t size;       /* sizeof(rxdeploy_submit_options), as this program was compiled */
    double deadline_s; /* a request that no batch has taken by then fails; INFINITY: none */
    double timeout_s;  /* longest to wait for room, then RXDEPLOY_REJECTED; INFINITY: as long as it takes */
    rxdeploy_callback callback; /* or NULL */
    void *user;                 /* for the callback */
} rxdeploy_submit_options;

RXDEPLOY_API void rxdeploy_submit_options_init(rxdeploy_submit_options *options, size_t size); /* as the other one */
#define rxdeploy_submit_options_init(options) \
    rxdeploy_submit_options_init((options), sizeof(rxdeploy_submit_options))

/* Queue one uint8 image (image_size, image_size, 3), of which a copy is made. `options` may be NULL. `request` gets a
 * handle to wait with, which is to be freed; it may be NULL where there is a callback. When this does not return
 * RXDEPLOY_OK there is no request, and no call of the callback. In a callback of the session's it does not wait for
 * room, which that very thread makes: a full queue is RXDEPLOY_REJECTED then. */
RXDEPLOY_API rxdeploy_status rxdeploy_submit(rxdeploy_session *session, const uint8_t *image,
                                             const rxdeploy_submit_options *options, rxdeploy_request **request);

/* Wait, `timeout_s` seconds at most, until the request is done. RXDEPLOY_OK: `logits` (may be NULL) has them;
 * RXDEPLOY_PENDING: it is not done yet; else how it failed. May be called again, by any number of threads. */
RXDEPLOY_API rxdeploy_status rxdeploy_request_wait(rxdeploy_request *request, double timeout_s, float *logits);
/* 1 when it was not started, and will not be: it fails with RXDEPLOY_CANCELLED. 0 when it is too late. */
RXDEPLOY_API int rxdeploy_request_cancel(rxdeploy_request *request);
/* Let the handle go; the request itself goes on. NULL is nothing. */
RXDEPLOY_API void rxdeploy_request_free(rxdeploy_request *request);

/* Metrics. Times in seconds. Percentiles are within 2.2 %. */

typedef struct rxdeploy_latency {
    uint64_t count;
    double sum, mean, p50, p90, p99, p999, max;
} rxdeploy_latency;

typedef struct rxdeploy_metrics {
    size_t size;    /* set it to sizeof(rxdeploy_metrics) before the call */
    double started; /* since 1970 */
    double uptime;
    uint64_t images;
    double images_per_second;            /* since the start */
    double images_per_second_recent;     /* over the last 10 seconds */
    double card_flops_per_second_recent; /* images_per_second_recent * card_flops; 0 where the card says none */
    double flops_per_second_recent;      /* images_per_second_recent * 2 * multiply_adds */
    rxdeploy_latency runs;               /* of the engine */
    uint64_t enqueued;                   /* runs on a caller's stream, which nobody here can time */
    uint64_t errors;                     /* runs that failed */
    rxdeploy_latency requests;           /* from rxdeploy_submit to the result */
    uint64_t batches;                    /* that requests were gathered in; the JSON has their sizes */
    uint64_t queue_depth, queue_depth_max;
    uint64_t failed, rejected, expired, cancelled; /* requests */
} rxdeploy_metrics;

RXDEPLOY_API rxdeploy_status rxdeploy_get_metrics(const rxdeploy_session *session, rxdeploy_metrics *metrics);
/* The same with histograms, as one JSON object with the names of the Python runtime, and as Prometheus' text format
 * 0.0.4. `text` is to be freed with rxdeploy_text_free. */
RXDEPLOY_API rxdeploy_status rxdeploy_metrics_json(const rxdeploy_session *session, char **text);
RXDEPLOY_API rxdeploy_status rxdeploy_metrics_prometheus(const rxdeploy_session *session, char **text);
RXDEPLOY_API void rxdeploy_text_free(char *text);

/* Bundles */

/* Whether `data` is a manifest that rxdeploy_open would take (its files are not looked at). */
RXDEPLOY_API rxdeploy_status rxdeploy_check_manifest(const char *data, size_t bytes);
/* Whether the bundle at `path` and all its files are as they were built. */
RXDEPLOY_API rxdeploy_status rxdeploy_check_bundle(const char *path);
/* The same, and whether one of the keys (as in rxdeploy_options) signed it as it is: RXDEPLOY_CHECK_FAILED if not. What is
 * no bundle at all is RXDEPLOY_INPUT_ERROR. */
RXDEPLOY_API rxdeploy_status rxdeploy_verify_bundle(const char *path, const char *const *trusted_keys,
                                                    size_t trusted_key_count);

#ifdef __cplusplus
}
#endif

#endif
