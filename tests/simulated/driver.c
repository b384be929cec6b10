// A CUDA driver that needs no GPU, for testing the logic of code that drives one: built as libcuda.so.1.
//
// Device memory is host memory that host code cannot reach: a device pointer lies in a range without access rights,
// and the contents lie at the same offset in another range, its shadow. A stream is a thread that works through a
// queue and may dawdle before each operation (SIM_DELAY_US), so that a missing synchronisation shows as wrong data.
// Memory is born full of 0xff (NaN) and no address is given out twice, so stale pointers do not go unnoticed.
//
// Stricter than the real thing where that is undocumented: synchronising or querying anything counts as an unsafe
// call while another thread captures in global mode. Simpler: a captured graph is replayed in the order of capture.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

// Numbers from cuda.h, and what a test may read about each call's end.
#define ERRORS(X)                                                                                                     \
    X(SUCCESS, 0, "no error") X(INVALID_VALUE, 1, "invalid argument") X(OUT_OF_MEMORY, 2, "out of memory")            \
    X(NOT_INITIALIZED, 3, "initialization error") X(NO_DEVICE, 100, "no CUDA-capable device is detected")             \
    X(INVALID_DEVICE, 101, "invalid device ordinal") X(INVALID_CONTEXT, 201, "invalid device context")                \
    X(INVALID_HANDLE, 400, "invalid resource handle") X(ILLEGAL_STATE, 401, "the operation cannot be performed now")  \
    X(NOT_FOUND, 500, "named symbol not found") X(NOT_READY, 600, "device not ready")                                 \
    X(ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")                                               \
    X(CONTEXT_IS_DESTROYED, 709, "context is destroyed") X(NOT_PERMITTED, 800, "operation not permitted")             \
    X(NOT_SUPPORTED, 801, "operation not supported")                                                                  \
    X(STREAM_CAPTURE_UNSUPPORTED, 900, "operation not permitted when stream is capturing")                            \
    X(STREAM_CAPTURE_INVALIDATED, 901, "operation failed due to a previous error during capture")                     \
    X(STREAM_CAPTURE_MERGE, 902, "operation would result in a merge of separate capture sequences")                   \
    X(STREAM_CAPTURE_UNMATCHED, 903, "capture was not ended in the same stream as it began")                          \
    X(STREAM_CAPTURE_UNJOINED, 904, "capturing stream has unjoined work")                                             \
    X(STREAM_CAPTURE_ISOLATION, 905, "dependency created on uncaptured work in another stream")                       \
    X(STREAM_CAPTURE_IMPLICIT, 906, "operation would make the legacy stream depend on a capturing blocking stream")   \
    X(CAPTURED_EVENT, 907, "operation not permitted on an event last recorded in a capturing stream")                 \
    X(STREAM_CAPTURE_WRONG_THREAD, 908, "attempt to terminate a thread-local capture sequence from another thread")
#define X(name, number, text) name = number,
enum status { ERRORS(X) };
#undef X

#define COUNTS(X)                                                                                                     \
    X(live_device_bytes) X(live_pinned_bytes) X(live_streams) X(live_events) X(live_graphs) X(live_graph_execs)       \
    X(primary_retained) X(allocations) X(graph_launches) X(copies) X(pageable_copies) X(misuse) X(host_funcs)         \
    X(abandoned) /* what was still alive when its context was destroyed */
#define X(name) name,
enum count { COUNTS(X) COUNT_OF_COUNTS };
#undef X

static struct { const char *name, *variable; uint64_t value; } settings[] = {
    {"gpus", "SIM_GPUS", 1},
    {"memory", "SIM_MEMORY", 8ull << 30},  // bytes on each GPU
    {"delay_us", "SIM_DELAY_US", 0},       // the longest a stream dawdles before an operation
    {"seed", "SIM_SEED", 1},
    {"compute_capability", "SIM_COMPUTE_CAPABILITY", 89},  // 8.9: the variable is written with the point
};
enum { GPUS, MEMORY, DELAY_US, SEED, COMPUTE_CAPABILITY, COUNT_OF_SETTINGS };

enum { MOST_GPUS = 8, DEEPEST = 16, LANES = 8, STREAMS = 1024, OBJECTS = 1 << 16 };
enum { NON_BLOCKING = 1 };                  // a stream's flag
enum { DISABLE_TIMING = 2, EXTERNAL = 1 };  // an event's flag; a flag of recording or waiting for one
enum { GLOBAL, THREAD_LOCAL, RELAXED };     // modes of capture

struct device { int retained, broken; unsigned flags; uint64_t used; struct object *legacy; };
struct mark { int holders, done; struct timespec at; };  // one recording of an event

struct op {
    enum { COPY, SET, CALL_HOST, RECORD, WAIT } kind;
    uint64_t to, from;  // `from` is the byte of a SET
    size_t size;
    void (*call)(void *), *data;
    void *owned;           // a COPY's source, when it was taken when the copy was enqueued
    struct mark *mark;     // of a RECORD or WAIT
    struct object *event;  // the same while captured: its mark is found when the graph is launched
    struct op *next;
};

// Whatever has a handle. Handles are addresses in one table, so stale and foreign ones are recognised.
struct object {
    enum kind { FREE, DRAINING, STREAM, EVENT, GRAPH, EXEC } kind;
    struct device *device;
    unsigned flags;
    struct op *first, **last;  // a STREAM's queue; what a GRAPH or EXEC consists of
    struct mark *mark;         // the latest recording of an EVENT; the latest launch of an EXEC
    // A STREAM's
    uint64_t queued, done, random;
    int closing, hidden, priority;  // hidden: a default stream, which no one created
    // A STREAM's and an EVENT's part in a capture: which, as what, and how much of each lane comes before it
    struct object *capture;
    uint64_t capture_id;
    unsigned lane, clock[LANES];
    // A GRAPH's while it is captured; then `clock` counts the operations of each lane
    struct object *origin;
    pthread_t thread;
    int mode, invalid;
    unsigned lanes;
};

struct block { uint64_t start; size_t size; struct device *owner; int live; };
struct region { uint64_t base, next; uint8_t *shadow; struct block *blocks; size_t count; };
enum { DEVICE, PINNED };
static const uint64_t REGION = 1ull << 40, PAGE = 4096, ALIGN = 256, POISONED = 64 << 20;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;  // guards everything below
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int ready;
static uint64_t counts[COUNT_OF_COUNTS], captures;
static char complaint[200] = "none";
static struct device devices[MOST_GPUS];
static struct object objects[OBJECTS];
static struct region regions[2];

static __thread struct device *stack[DEEPEST], *here;  // this thread's contexts, and the one a call works in
static __thread int depth, thread_mode = GLOBAL;
static __thread struct object *own_streams[MOST_GPUS], *running;  // running: whose host function this thread is in

__attribute__((constructor)) static void read_settings(void) {
    for (int i = 0; i < COUNT_OF_SETTINGS; i++) {
        const char *text = getenv(settings[i].variable);
        if (!text || !*text) continue;
        settings[i].value = 0;
        for (; *text; text++)
            if (*text >= '0' && *text <= '9') settings[i].value = settings[i].value * 10 + (uint64_t)(*text - '0');
    }
    if (settings[GPUS].value > MOST_GPUS) settings[GPUS].value = MOST_GPUS;
}

// Every call: what it needs, then its own part, then the count of what callers should not do

enum { INIT = 1, CONTEXT = 2, UNSAFE = 4, TIDY = 8 };  // UNSAFE: not while capturing; TIDY: also in a broken context

static void complain(const char *where, const char *what) {
    counts[misuse]++;
    snprintf(complaint, sizeof complaint, "%s: %s", where, what);
}

static const char *text_of(int status, int name) {
    switch (status) {
#define X(id, number, text) case number: return name ? "CUDA_ERROR_" #id : text;
        ERRORS(X)
#undef X
    }
    return NULL;
}

static int mine(struct object *graph) { return pthread_equal(graph->thread, pthread_self()); }

// An unsafe call breaks every capture that forbids it to this thread (cuda.h, cuThreadExchangeStreamCaptureMode).
static int check_captures(void) {
    int status = SUCCESS;
    for (int i = 0; captures && i < STREAMS; i++) {
        struct object *graph = objects[i].kind == STREAM ? objects[i].capture : NULL;
        if (!graph) continue;
        if (mine(graph) ? graph->mode == RELAXED || thread_mode == RELAXED
                        : graph->mode != GLOBAL || thread_mode != GLOBAL) continue;
        graph->invalid = 1;
        status = STREAM_CAPTURE_UNSUPPORTED;
    }
    return status;
}

static int enter(int needs) {
    pthread_mutex_lock(&lock);
    here = depth ? stack[depth - 1] : NULL;
    if (running) return NOT_PERMITTED;
    if (needs && !ready) return NOT_INITIALIZED;
    if (!(needs & CONTEXT)) return SUCCESS;
    if (!here) return INVALID_CONTEXT;
    if (!here->retained) return CONTEXT_IS_DESTROYED;
    if (here->broken && !(needs & TIDY)) return here->broken;
    return needs & UNSAFE ? check_captures() : SUCCESS;
}

static int leave(int status, const char *function) {
    if (status == INVALID_VALUE || status == INVALID_CONTEXT || status == INVALID_HANDLE || status == INVALID_DEVICE ||
        status == CONTEXT_IS_DESTROYED || status == NOT_PERMITTED || status == NOT_INITIALIZED)
        complain(function, text_of(status, 1));
    pthread_mutex_unlock(&lock);
    return status;
}

#define CALL(needs, ...)                   \
    do {                                   \
        int status = enter(needs);         \
        if (!status) { __VA_ARGS__; }      \
        return leave(status, __func__);    \
    } while (0)

// Handles

static struct object *create(enum kind kind) {
    static size_t cursor[2];  // moves on, so that a handle stays dead for long
    size_t first = kind == STREAM ? 0 : STREAMS, number = kind == STREAM ? STREAMS : OBJECTS - STREAMS;
    size_t *next = &cursor[kind == STREAM];
    for (size_t tried = 0; tried < number; tried++) {
        struct object *object = &objects[first + (*next)++ % number];
        if (object->kind != FREE) continue;
        memset(object, 0, sizeof *object);
        object->kind = kind;
        object->device = here;
        object->last = &object->first;
        return object;
    }
    fprintf(stderr, "simulated driver: out of handles\n");
    abort();
}

static struct object *find(void *handle, enum kind kind) {
    uintptr_t offset = (uintptr_t)handle - (uintptr_t)objects;
    if (offset >= sizeof objects || offset % sizeof *objects) return NULL;
    struct object *object = handle;
    return object->kind == kind && !object->hidden ? object : NULL;
}

static struct mark *hold(struct mark *mark) {
    if (mark) mark->holders++;
    return mark;
}

static void let_go(struct mark *mark) {
    if (mark && !--mark->holders) free(mark);
}

static struct mark *new_mark(void) {
    struct mark *mark = calloc(1, sizeof *mark);
    return hold(mark);
}

static void append(struct object *object, struct op op) {
    struct op *copy = malloc(sizeof *copy);
    *copy = op;
    copy->next = NULL;
    *object->last = copy;
    object->last = &copy->next;
}

static void free_ops(struct object *object) {
    for (struct op *op = object->first, *next; op; op = next) {
        next = op->next;
        free(op);
    }
}

// Memory

static struct block *block_at(uint64_t address, int *which) {
    for (int kind = DEVICE; kind <= PINNED; kind++) {
        struct region *region = &regions[kind];
        if (!region->base || address - region->base >= REGION) continue;
        *which = kind;
        size_t low = 0, high = region->count;
        while (low < high) {
            size_t middle = (low + high) / 2;
            if (region->blocks[middle].start <= address) low = middle + 1;
            else high = middle;
        }
        return low ? &region->blocks[low - 1] : NULL;
    }
    *which = -1;
    return NULL;
}

static uint8_t *shadow_of(uint64_t address, int which) {
    return regions[which].shadow + (address - regions[which].base);
}

// Where the `size` bytes at an address really are; NULL when they are not all inside one living allocation.
// What is in neither region is taken for pageable host memory.
static uint8_t *reach(uint64_t address, size_t size, int *pageable) {
    int which;
    struct block *block = block_at(address, &which);
    if (pageable) *pageable = which < 0;
    if (which < 0) return address < PAGE ? NULL : (uint8_t *)address;
    if (!block || !block->live || address - block->start > block->size) return NULL;
    return size > block->size - (address - block->start) ? NULL : shadow_of(address, which);
}

static uint64_t pages(size_t size) { return (ALIGN + size + PAGE - 1) / PAGE * PAGE; }

static int allocate(int which, size_t size, uint64_t *address) {
    struct region *region = &regions[which];
    if (!size || !address) return INVALID_VALUE;
    if (size > REGION || region->next + pages(size) + PAGE > region->base + REGION) return OUT_OF_MEMORY;
    if (which == DEVICE && here->used + size > settings[MEMORY].value) return OUT_OF_MEMORY;
    // No more than the driver promises: aligned to 256 bytes and not to 512. Then a page that belongs to no one.
    uint64_t start = region->next + ALIGN;
    region->next += pages(size) + PAGE;
    if (which == PINNED && mprotect((void *)(start - ALIGN), pages(size), PROT_READ | PROT_WRITE)) return OUT_OF_MEMORY;
    memset(shadow_of(start, which), 0xff, size < POISONED ? size : POISONED);
    if (!(region->count & (region->count - 1)))  // full: the room is always a power of two
        region->blocks = realloc(region->blocks, (region->count ? region->count * 2 : 1) * sizeof *region->blocks);
    region->blocks[region->count++] = (struct block){start, size, here, 1};
    if (which == DEVICE) here->used += size;
    counts[which == DEVICE ? live_device_bytes : live_pinned_bytes] += size;
    counts[allocations]++;
    *address = start;
    return SUCCESS;
}

static void release(struct block *block, int which) {
    block->live = 0;
    if (which == DEVICE) block->owner->used -= block->size;
    counts[which == DEVICE ? live_device_bytes : live_pinned_bytes] -= block->size;
    madvise(shadow_of(block->start, which) - ALIGN, pages(block->size), MADV_DONTNEED);
    if (which == PINNED) mprotect((void *)(block->start - ALIGN), pages(block->size), PROT_NONE);
}

static void drain(struct device *device) {
    for (int i = 0; i < STREAMS; i++)
        while (objects[i].kind != FREE && objects[i].device == device && objects[i].done != objects[i].queued)
            pthread_cond_wait(&changed, &lock);
}

// Freeing waits for the device, as the real driver does.
static int free_memory(int wanted, uint64_t address) {
    int which;
    struct block *block = block_at(address, &which);
    if (!block || which != wanted || !block->live || block->start != address) return INVALID_VALUE;
    struct device *owner = block->owner;
    drain(owner);
    block = block_at(address, &which);  // the table may have moved meanwhile
    if (!block->live) return INVALID_VALUE;
    release(block, which);
    return owner->broken;
}

// Streams

static void run(struct object *stream, struct op *op) {
    struct device *device = stream->device;
    int from_pageable = 0, to_pageable = 0;
    uint8_t *to = NULL, *from = NULL;
    if (op->kind == WAIT) {
        while (!op->mark->done) pthread_cond_wait(&changed, &lock);
        return;
    }
    if (op->kind == RECORD) {
        clock_gettime(CLOCK_MONOTONIC, &op->mark->at);
        op->mark->done = 1;
        return;
    }
    if (device->broken) return;
    if (op->kind == COPY || op->kind == SET) {
        to = reach(op->to, op->size, &to_pageable);
        from = op->kind == SET || op->owned ? op->owned : reach(op->from, op->size, &from_pageable);
        if (!to || (op->kind == COPY && !from)) {
            device->broken = ILLEGAL_ADDRESS;
            complain(op->kind == COPY ? "a copy" : "a memset", "not inside one living allocation");
            return;
        }
        counts[copies] += op->kind == COPY;
        counts[pageable_copies] += op->kind == COPY && (to_pageable || from_pageable || op->owned);
    } else {
        counts[host_funcs]++;
        running = stream;
    }
    pthread_mutex_unlock(&lock);
    if (op->kind == COPY) memmove(to, from, op->size);
    else if (op->kind == SET) memset(to, (int)op->from, op->size);
    else op->call(op->data);
    pthread_mutex_lock(&lock);
    running = NULL;
}

static void dawdle(struct object *stream) {
    uint64_t longest = settings[DELAY_US].value;
    if (!longest) return;
    stream->random ^= stream->random << 13;  // xorshift64
    stream->random ^= stream->random >> 7;
    stream->random ^= stream->random << 17;
    uint64_t delay = stream->random % (longest + 1);
    struct timespec time = {(time_t)(delay / 1000000), (long)(delay % 1000000 * 1000)};
    pthread_mutex_unlock(&lock);
    nanosleep(&time, NULL);
    pthread_mutex_lock(&lock);
}

static void *work(void *argument) {
    struct object *stream = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!stream->first && !stream->closing) pthread_cond_wait(&changed, &lock);
        struct op *op = stream->first;
        if (!op) break;
        dawdle(stream);
        run(stream, op);
        stream->first = op->next;
        if (!stream->first) stream->last = &stream->first;
        stream->done++;
        let_go(op->mark);
        free(op->owned);
        free(op);
        pthread_cond_broadcast(&changed);
    }
    stream->kind = FREE;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static struct object *new_stream(unsigned flags, int priority) {
    struct object *stream = create(STREAM);
    pthread_t thread;
    stream->flags = flags;
    stream->priority = priority;
    stream->random = (settings[SEED].value * 1000003 + (uint64_t)(stream - objects) + 1) * 0x9e3779b97f4a7c15ull | 1;
    if (pthread_create(&thread, NULL, work, stream)) abort();
    pthread_detach(thread);
    return stream;
}

static struct object *hidden_stream(struct object **slot) {
    if (!*slot || (*slot)->kind != STREAM || !(*slot)->hidden) {
        *slot = new_stream(0, 0);
        (*slot)->hidden = 1;
    }
    return *slot;
}

// Handles 0 and 1 are the context's legacy default stream, 2 is the thread's own.
static int find_stream(void *handle, struct object **stream) {
    uintptr_t number = (uintptr_t)handle;
    *stream = number < 2    ? hidden_stream(&here->legacy)
              : number == 2 ? hidden_stream(&own_streams[here - devices])
                            : find(handle, STREAM);
    return *stream ? SUCCESS : INVALID_HANDLE;
}

static void enqueue(struct object *stream, struct op op) {
    append(stream, op);
    stream->queued++;
    pthread_cond_broadcast(&changed);
}

static void order(struct object *before, struct object *after) {
    if (before->done == before->queued) return;
    struct mark *mark = new_mark();
    enqueue(before, (struct op){.kind = RECORD, .mark = hold(mark)});
    enqueue(after, (struct op){.kind = WAIT, .mark = mark});
}

// The legacy stream waits for all blocking streams of its context, and they wait for it.
static int order_with_legacy(struct object *stream) {
    struct object *legacy = stream->device->legacy;
    if (stream != legacy) {
        if (legacy && !(stream->flags & NON_BLOCKING)) order(legacy, stream);
        return SUCCESS;
    }
    for (int i = 0; i < STREAMS; i++) {
        struct object *other = &objects[i];
        if (other->kind == FREE || other->device != stream->device || other->flags & NON_BLOCKING || other == legacy)
            continue;
        if (other->capture) {
            other->capture->invalid = 1;
            return STREAM_CAPTURE_IMPLICIT;
        }
        order(other, legacy);
    }
    return SUCCESS;
}

static int submit(struct object *stream, struct op op) {
    struct object *graph = stream->capture;
    if (graph) {
        if (graph->invalid) return STREAM_CAPTURE_INVALIDATED;
        append(graph, op);
        graph->clock[stream->lane]++;
        stream->clock[stream->lane]++;
        return SUCCESS;
    }
    if (stream->device->broken) return stream->device->broken;
    int status = order_with_legacy(stream);
    if (!status) enqueue(stream, op);
    return status;
}

static void wait_for(struct object *stream) {
    for (uint64_t target = stream->queued; stream->kind != FREE && stream->done < target;)
        pthread_cond_wait(&changed, &lock);
}

static int synchronize(struct object *stream) {
    if (stream->capture) {
        stream->capture->invalid = 1;
        return STREAM_CAPTURE_UNSUPPORTED;
    }
    struct device *device = stream->device;
    if (stream == device->legacy) {
        int status = order_with_legacy(stream);
        if (status) return status;
    }
    wait_for(stream);
    return device->broken;
}

// Conflicts with a capture in the context whatever its mode, as NVIDIA/TensorRT issue 2888 found.
static int synchronize_all(struct device *device) {
    for (int i = 0; i < STREAMS; i++) {
        struct object *stream = &objects[i];
        if (stream->kind == STREAM && stream->device == device && stream->capture) return synchronize(stream);
    }
    drain(device);
    return device->broken;
}

// Pageable memory is read before the call returns and written before it returns, as the real driver does.
static int copy(uint64_t to, uint64_t from, size_t size, struct object *stream, int synchronous) {
    struct op op = {.kind = COPY, .to = to, .from = from, .size = size};
    int to_pageable, from_pageable;
    uint8_t *source = reach(from, size, &from_pageable), *target = reach(to, size, &to_pageable);
    if (!size) return SUCCESS;
    if ((to_pageable && !target) || (from_pageable && !source)) return INVALID_VALUE;
    if (from_pageable && !stream->capture) op.owned = memcpy(malloc(size), source, size);
    int status = submit(stream, op);
    if (status) free(op.owned);
    else if (synchronous || (to_pageable && !stream->capture)) status = synchronize(stream);
    return status;
}

static void close_stream(struct object *stream) {
    if (stream->capture) stream->capture->invalid = 1;
    if (stream->capture && stream->capture->origin == stream) captures--;
    stream->kind = DRAINING;
    stream->closing = 1;
    pthread_cond_broadcast(&changed);
}

// Events

static int record(struct object *event, struct object *stream, unsigned flags) {
    int external = stream->capture && flags & EXTERNAL;
    if (event->device != stream->device) return INVALID_HANDLE;
    if (external) return submit(stream, (struct op){.kind = RECORD, .event = event});
    struct mark *mark = NULL;
    int status = SUCCESS;
    event->capture = stream->capture;
    if (stream->capture) {
        if (stream->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
        event->capture_id = stream->capture->capture_id;
        memcpy(event->clock, stream->clock, sizeof event->clock);
    } else {
        mark = new_mark();
        status = submit(stream, (struct op){.kind = RECORD, .mark = hold(mark)});
        if (status) free(mark);
        if (status) return status;
    }
    let_go(event->mark);
    event->mark = mark;
    return status;
}

static int join_capture(struct object *stream, struct object *event) {
    struct object *graph = event->capture;
    if (graph->kind != GRAPH || !graph->origin || graph->capture_id != event->capture_id) return INVALID_VALUE;
    if (stream->capture && stream->capture != graph) {
        stream->capture->invalid = graph->invalid = 1;
        return STREAM_CAPTURE_MERGE;
    }
    if (!stream->capture) {
        if (graph->lanes == LANES || stream == stream->device->legacy) return STREAM_CAPTURE_IMPLICIT;
        stream->capture = graph;
        stream->lane = graph->lanes++;
        memset(stream->clock, 0, sizeof stream->clock);
    }
    for (int lane = 0; lane < LANES; lane++)
        if (stream->clock[lane] < event->clock[lane]) stream->clock[lane] = event->clock[lane];
    return SUCCESS;
}

static int wait_event(struct object *stream, struct object *event, unsigned flags) {
    if (event->capture) return join_capture(stream, event);
    if (stream->capture && flags & EXTERNAL) return submit(stream, (struct op){.kind = WAIT, .event = event});
    if (stream->capture) {
        stream->capture->invalid = 1;
        return STREAM_CAPTURE_ISOLATION;
    }
    return event->mark ? submit(stream, (struct op){.kind = WAIT, .mark = hold(event->mark)}) : SUCCESS;
}

static int event_done(struct object *event, int wait) {
    if (event->capture) {
        if (event->capture->kind == GRAPH && event->capture->capture_id == event->capture_id)
            event->capture->invalid = event->capture->origin != NULL;
        return CAPTURED_EVENT;
    }
    struct device *device = event->device;
    struct mark *mark = hold(event->mark);
    while (wait && mark && !mark->done) pthread_cond_wait(&changed, &lock);
    int done = !mark || mark->done;
    let_go(mark);
    return device->broken ? device->broken : done ? SUCCESS : NOT_READY;
}

static int elapsed(float *milliseconds, struct object *start, struct object *end) {
    if (!start || !end || start->device != end->device) return INVALID_HANDLE;
    if ((start->flags | end->flags) & DISABLE_TIMING) return INVALID_HANDLE;
    if (start->capture || end->capture) return CAPTURED_EVENT;
    if (!start->mark || !end->mark) return INVALID_HANDLE;
    if (!start->mark->done || !end->mark->done) return NOT_READY;
    struct timespec from = start->mark->at, to = end->mark->at;
    *milliseconds = (float)((double)(to.tv_sec - from.tv_sec) * 1e3 + (double)(to.tv_nsec - from.tv_nsec) / 1e6);
    return SUCCESS;
}

static void destroy(struct object *object, enum count living) {
    free_ops(object);
    let_go(object->mark);
    object->kind = FREE;
    counts[living]--;
}

// Graphs

static int begin_capture(struct object *stream, int mode) {
    static uint64_t id;
    if (stream->capture || (unsigned)mode > RELAXED) return stream->capture ? ILLEGAL_STATE : INVALID_VALUE;
    if (stream == stream->device->legacy) return STREAM_CAPTURE_UNSUPPORTED;
    struct object *graph = create(GRAPH);
    graph->origin = stream;
    graph->thread = pthread_self();
    graph->mode = mode;
    graph->capture_id = ++id;
    graph->lanes = 1;
    stream->capture = graph;
    stream->lane = 0;
    memset(stream->clock, 0, sizeof stream->clock);
    counts[live_graphs]++;
    captures++;
    return SUCCESS;
}

static int end_capture(struct object *stream, struct object **result) {
    struct object *graph = stream->capture;
    *result = NULL;
    if (!graph) return ILLEGAL_STATE;
    if (graph->origin != stream) return STREAM_CAPTURE_UNMATCHED;
    if (graph->mode != RELAXED && !mine(graph)) return STREAM_CAPTURE_WRONG_THREAD;
    int status = graph->invalid ? STREAM_CAPTURE_INVALIDATED : SUCCESS;
    for (int lane = 0; lane < LANES && !status; lane++)
        if (stream->clock[lane] < graph->clock[lane]) status = STREAM_CAPTURE_UNJOINED;
    for (int i = 0; i < STREAMS; i++)
        if (objects[i].capture == graph) objects[i].capture = NULL;
    graph->origin = NULL;
    captures--;
    if (status) destroy(graph, live_graphs);
    else *result = graph;
    return status;
}

static int instantiate(struct object *graph, struct object **result) {
    if (!graph || graph->origin) return INVALID_VALUE;
    *result = create(EXEC);
    for (struct op *op = graph->first; op; op = op->next) append(*result, *op);
    counts[live_graph_execs]++;
    return SUCCESS;
}

// The operations go into the stream one by one; a second launch of the same graph waits for the first.
static int launch(struct object *exec, struct object *stream) {
    int status = SUCCESS;
    if (exec->mark && !exec->mark->done && !stream->capture)
        status = submit(stream, (struct op){.kind = WAIT, .mark = hold(exec->mark)});
    for (struct op *op = exec->first; op && !status; op = op->next) {
        if (!op->event || stream->capture) status = submit(stream, *op);
        else if (op->event->kind != EVENT) status = INVALID_HANDLE;
        else status = op->kind == RECORD ? record(op->event, stream, 0) : wait_event(stream, op->event, 0);
    }
    if (status || stream->capture) return status;
    let_go(exec->mark);
    exec->mark = new_mark();
    counts[graph_launches]++;
    return submit(stream, (struct op){.kind = RECORD, .mark = hold(exec->mark)});
}

// Devices and contexts

static int device_of(int ordinal, struct device **device) {
    if (ordinal < 0 || (uint64_t)ordinal >= settings[GPUS].value) return INVALID_DEVICE;
    *device = &devices[ordinal];
    return SUCCESS;
}

static int is_context(struct device *context) {
    return context >= devices && context < devices + MOST_GPUS && context->retained;
}

static void destroy_context(struct device *device) {
    drain(device);
    for (int i = 0; i < OBJECTS; i++) {
        static const enum count living[] = {
            [STREAM] = live_streams, [EVENT] = live_events, [GRAPH] = live_graphs, [EXEC] = live_graph_execs};
        struct object *object = &objects[i];
        if (object->device != device || object->kind <= DRAINING) continue;
        counts[abandoned] += !object->hidden;
        if (object->kind != STREAM) destroy(object, living[object->kind]);
        else {
            counts[live_streams] -= !object->hidden;
            close_stream(object);
        }
    }
    for (int which = DEVICE; which <= PINNED; which++)
        for (size_t i = 0; i < regions[which].count; i++) {
            struct block *block = &regions[which].blocks[i];
            if (!block->live || block->owner != device) continue;
            counts[abandoned]++;
            release(block, which);
        }
    device->legacy = NULL;
    device->broken = 0;
}

static int attribute_of(int attribute) {
    int capability = (int)settings[COMPUTE_CAPABILITY].value;
    switch (attribute) {  // CUdevice_attribute
        case 1: case 2: return 1024;                     // threads per block, block width
        case 10: return 32;                              // warp size
        case 13: return 1500000;                         // clock rate, kHz
        case 15: case 19: case 31: case 41: case 78: return 1;  // overlap, mapped host memory, concurrent
                                                         // kernels, unified addressing, stream priorities
        case 16: return 16;                              // multiprocessors
        case 36: return 1000000;                         // memory clock rate, kHz
        case 37: return 128;                             // memory bus width, bits
        case 38: return 4 << 20;                         // level 2 cache, bytes
        case 39: return 1536;                            // threads per multiprocessor
        case 40: return 2;                               // asynchronous engines
        case 75: return capability / 10;
        case 76: return capability % 10;
        default: return 0;
    }
}

// The attributes of memory that code asks for to tell device memory from host memory.
static int pointer_attribute(int attribute, uint64_t pointer, void *data) {
    int which;
    struct block *block = block_at(pointer, &which);
    if (!block || !block->live || pointer - block->start >= block->size) return NOT_FOUND;
    switch (attribute) {  // CUpointer_attribute
        case 1: *(void **)data = block->owner; return SUCCESS;
        case 2: *(unsigned *)data = which == DEVICE ? 2 : 1; return SUCCESS;
        case 3: *(uint64_t *)data = pointer; return SUCCESS;
        case 4: *(uint64_t *)data = which == DEVICE ? 0 : pointer; return which == DEVICE ? NOT_FOUND : SUCCESS;
        case 8: *(unsigned *)data = 0; return SUCCESS;
        case 9: *(int *)data = (int)(block->owner - devices); return SUCCESS;
        case 11: *(uint64_t *)data = block->start; return SUCCESS;
        case 12: *(size_t *)data = block->size; return SUCCESS;
        case 13: *(unsigned *)data = 1; return SUCCESS;
        default: return NOT_SUPPORTED;
    }
}

static int start(void) {
    if (ready) return SUCCESS;
    if (!settings[GPUS].value) return NO_DEVICE;
    for (int which = DEVICE; which <= PINNED; which++) {
        struct region *region = &regions[which];
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void *base = mmap(NULL, REGION, PROT_NONE, flags, -1, 0);
        void *shadow = which == PINNED ? base : mmap(NULL, REGION, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (base == MAP_FAILED || shadow == MAP_FAILED) return OUT_OF_MEMORY;
        region->base = region->next = (uint64_t)base;
        region->shadow = shadow;
    }
    ready = 1;
    return SUCCESS;
}

// The driver's functions. In each, `status` is what it returns; the macros find what most of them need first.

#define WITH_DEVICE(...)                                                              \
    do {                                                                              \
        struct device *device;                                                        \
        CALL(INIT, if (!(status = device_of(ordinal, &device))) { __VA_ARGS__; });    \
    } while (0)
#define WITH_STREAM(needs, ...)                                                               \
    do {                                                                                      \
        struct object *stream;                                                                \
        CALL(needs, if (!(status = find_stream(stream_handle, &stream))) { __VA_ARGS__; });   \
    } while (0)
#define WITH(type, needs, missing, ...)                                 \
    do {                                                                \
        struct object *object;                                          \
        CALL(needs, object = find(handle, type);                         \
             if (!object) status = missing; else { __VA_ARGS__; });     \
    } while (0)
enum { PLAIN = INIT | CONTEXT };  // what most calls need

int cuInit(unsigned flags) { CALL(0, status = flags ? INVALID_VALUE : start()); }
int cuDriverGetVersion(int *version) { CALL(0, *version = 13000); }

int cuGetErrorName(int error, const char **text) {
    *text = error ? text_of(error, 1) : "CUDA_SUCCESS";
    return *text ? SUCCESS : INVALID_VALUE;
}
int cuGetErrorString(int error, const char **text) {
    *text = text_of(error, 0);
    return *text ? SUCCESS : INVALID_VALUE;
}

// Devices and contexts

int cuDeviceGetCount(int *count) { CALL(INIT, *count = (int)settings[GPUS].value); }
int cuDeviceGet(int *number, int ordinal) { WITH_DEVICE(*number = ordinal); }
int cuDeviceGetName(char *name, int length, int ordinal) {
    WITH_DEVICE(snprintf(name, (size_t)length, "Simulated GPU"));
}
int cuDeviceGetUuid_v2(char uuid[16], int ordinal) {
    WITH_DEVICE(memcpy(uuid, "simulated GPU  ", 16); uuid[15] = (char)ordinal);
}
int cuDeviceTotalMem_v2(size_t *bytes, int ordinal) { WITH_DEVICE(*bytes = settings[MEMORY].value); }
int cuDeviceGetAttribute(int *value, int attribute, int ordinal) { WITH_DEVICE(*value = attribute_of(attribute)); }

int cuDevicePrimaryCtxRetain(struct device **context, int ordinal) {
    WITH_DEVICE(*context = device; device->retained++; counts[primary_retained]++);
}
int cuDevicePrimaryCtxRelease_v2(int ordinal) {
    WITH_DEVICE(
        if (!device->retained) status = INVALID_CONTEXT;
        else {
            if (device->retained == 1) destroy_context(device);
            device->retained--;
            counts[primary_retained]--;
        });
}
int cuDevicePrimaryCtxReset_v2(int ordinal) { WITH_DEVICE(destroy_context(device)); }
int cuDevicePrimaryCtxGetState(int ordinal, unsigned *flags, int *active) {
    WITH_DEVICE(*flags = device->flags; *active = device->retained > 0);
}
int cuDevicePrimaryCtxSetFlags_v2(int ordinal, unsigned flags) { WITH_DEVICE(device->flags = flags); }

int cuCtxPushCurrent_v2(struct device *context) {
    CALL(INIT, if (!is_context(context)) status = INVALID_CONTEXT;
         else if (depth == DEEPEST) status = INVALID_VALUE;
         else stack[depth++] = context);
}
int cuCtxPopCurrent_v2(struct device **context) {
    CALL(INIT, if (!here) status = INVALID_CONTEXT;
         else {
             depth--;
             if (context) *context = here;
         });
}
int cuCtxSetCurrent(struct device *context) {
    CALL(INIT, if (context && !is_context(context)) status = INVALID_CONTEXT;
         else {
             depth -= depth > 0;
             if (context) stack[depth++] = context;
         });
}
int cuCtxGetCurrent(struct device **context) { CALL(INIT, *context = here); }
int cuCtxGetDevice(int *ordinal) { CALL(PLAIN, *ordinal = (int)(here - devices)); }
int cuCtxGetFlags(unsigned *flags) { CALL(PLAIN, *flags = here->flags); }
int cuCtxSynchronize(void) { CALL(PLAIN | UNSAFE, status = synchronize_all(here)); }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { CALL(PLAIN, *least = 0; *greatest = -5); }
int cuThreadExchangeStreamCaptureMode(int *mode) {
    CALL(INIT, int old = thread_mode; thread_mode = *mode; *mode = old);
}

// Memory

int cuMemGetInfo_v2(size_t *available, size_t *total) {
    CALL(PLAIN, *total = settings[MEMORY].value; *available = *total - here->used);
}
int cuMemAlloc_v2(uint64_t *pointer, size_t size) { CALL(PLAIN | UNSAFE, status = allocate(DEVICE, size, pointer)); }
int cuMemFree_v2(uint64_t pointer) { CALL(PLAIN | UNSAFE | TIDY, status = free_memory(DEVICE, pointer)); }
int cuMemHostAlloc(uint64_t *pointer, size_t size, unsigned flags) {
    CALL(PLAIN | UNSAFE, (void)flags; status = allocate(PINNED, size, pointer));
}
int cuMemFreeHost(uint64_t pointer) { CALL(PLAIN | UNSAFE | TIDY, status = free_memory(PINNED, pointer)); }
int cuMemHostGetDevicePointer_v2(uint64_t *device, uint64_t pointer, unsigned flags) {
    int which;
    CALL(PLAIN, struct block *block = block_at(pointer, &which); *device = pointer;
         if (flags || !block || !block->live || which != PINNED) status = INVALID_VALUE);
}

// Asking about any pointer is no misuse.
int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
    enter(0);
    int status = pointer_attribute(attribute, pointer, data);
    leave(SUCCESS, __func__);
    return status == NOT_FOUND ? INVALID_VALUE : status;
}
int cuPointerGetAttributes(unsigned number, const int *attributes, void **data, uint64_t pointer) {
    enter(0);
    for (unsigned i = 0; i < number; i++) {
        size_t size = attributes[i] == 2 || attributes[i] == 8 || attributes[i] == 9 || attributes[i] == 13 ? 4 : 8;
        if (pointer_attribute(attributes[i], pointer, data[i])) memset(data[i], 0, size);
    }
    return leave(SUCCESS, __func__);
}

#define ASYNCHRONOUS_COPY(name)                                                        \
    int name(uint64_t to, uint64_t from, size_t size, void *stream_handle) {           \
        WITH_STREAM(PLAIN, status = copy(to, from, size, stream, 0));                  \
    }
#define SYNCHRONOUS_COPY(name)                                                         \
    int name(uint64_t to, uint64_t from, size_t size) {                                \
        void *stream_handle = NULL;                                                    \
        WITH_STREAM(PLAIN | UNSAFE, status = copy(to, from, size, stream, 1));         \
    }
ASYNCHRONOUS_COPY(cuMemcpyAsync)
ASYNCHRONOUS_COPY(cuMemcpyHtoDAsync_v2)
ASYNCHRONOUS_COPY(cuMemcpyDtoHAsync_v2)
ASYNCHRONOUS_COPY(cuMemcpyDtoDAsync_v2)
SYNCHRONOUS_COPY(cuMemcpy)
SYNCHRONOUS_COPY(cuMemcpyHtoD_v2)
SYNCHRONOUS_COPY(cuMemcpyDtoH_v2)
SYNCHRONOUS_COPY(cuMemcpyDtoD_v2)
int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t size, void *stream_handle) {
    WITH_STREAM(PLAIN, status = submit(stream, (struct op){.kind = SET, .to = to, .from = byte, .size = size}));
}

// Streams

int cuStreamCreateWithPriority(struct object **stream, unsigned flags, int priority) {
    CALL(PLAIN, if (flags > NON_BLOCKING) status = INVALID_VALUE;
         else {
             *stream = new_stream(flags, priority);
             counts[live_streams]++;
         });
}
int cuStreamCreate(struct object **stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }
int cuStreamDestroy_v2(void *handle) {
    WITH(STREAM, PLAIN | TIDY, INVALID_HANDLE, close_stream(object); counts[live_streams]--; status = here->broken);
}
int cuStreamSynchronize(void *stream_handle) { WITH_STREAM(PLAIN | UNSAFE, status = synchronize(stream)); }
int cuStreamQuery(void *stream_handle) {
    WITH_STREAM(PLAIN | UNSAFE, if (stream->capture) status = synchronize(stream);
                else status = stream->done == stream->queued ? SUCCESS : NOT_READY);
}
int cuStreamGetCtx(void *stream_handle, struct device **context) { WITH_STREAM(PLAIN, *context = stream->device); }
int cuStreamGetDevice(void *stream_handle, int *ordinal) {
    WITH_STREAM(PLAIN, *ordinal = (int)(stream->device - devices));
}
int cuStreamGetFlags(void *stream_handle, unsigned *flags) { WITH_STREAM(PLAIN, *flags = stream->flags); }
int cuStreamGetPriority(void *stream_handle, int *priority) { WITH_STREAM(PLAIN, *priority = stream->priority); }
int cuStreamWaitEvent(void *stream_handle, void *handle, unsigned flags) {
    WITH_STREAM(PLAIN, struct object *event = find(handle, EVENT);
                status = event ? wait_event(stream, event, flags) : INVALID_HANDLE);
}
int cuLaunchHostFunc(void *stream_handle, void (*call)(void *), void *data) {
    WITH_STREAM(PLAIN, if (!call) status = INVALID_VALUE;
                else status = submit(stream, (struct op){.kind = CALL_HOST, .call = call, .data = data}));
}

// Events

int cuEventCreate(struct object **event, unsigned flags) {
    CALL(PLAIN, *event = create(EVENT); (*event)->flags = flags; counts[live_events]++);
}
int cuEventDestroy_v2(void *handle) {
    WITH(EVENT, PLAIN | TIDY, INVALID_HANDLE, destroy(object, live_events); status = here->broken);
}
int cuEventRecordWithFlags(void *handle, void *stream_handle, unsigned flags) {
    WITH_STREAM(PLAIN, struct object *event = find(handle, EVENT);
                status = event ? record(event, stream, flags) : INVALID_HANDLE);
}
int cuEventRecord(void *handle, void *stream_handle) { return cuEventRecordWithFlags(handle, stream_handle, 0); }
int cuEventSynchronize(void *handle) { WITH(EVENT, PLAIN | UNSAFE, INVALID_HANDLE, status = event_done(object, 1)); }
int cuEventQuery(void *handle) { WITH(EVENT, PLAIN | UNSAFE, INVALID_HANDLE, status = event_done(object, 0)); }
int cuEventElapsedTime_v2(float *milliseconds, void *start, void *end) {
    CALL(PLAIN, status = elapsed(milliseconds, find(start, EVENT), find(end, EVENT)));
}

// Graphs

int cuStreamIsCapturing(void *stream_handle, int *capturing) {
    WITH_STREAM(PLAIN, *capturing = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1);
}
// The nodes are not told.
int cuStreamGetCaptureInfo_v3(void *stream_handle, int *capturing, uint64_t *id, void **graph, const void **nodes,
                              const void **edges, size_t *number) {
    WITH_STREAM(PLAIN, *capturing = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
                if (id) *id = stream->capture ? stream->capture->capture_id : 0;
                if (graph) *graph = stream->capture;
                if (nodes) *nodes = NULL;
                if (edges) *edges = NULL;
                if (number) *number = 0);
}
int cuStreamGetCaptureInfo_v2(void *stream_handle, int *capturing, uint64_t *id, void **graph, const void **nodes,
                              size_t *number) {
    return cuStreamGetCaptureInfo_v3(stream_handle, capturing, id, graph, nodes, NULL, number);
}
int cuStreamBeginCapture_v2(void *stream_handle, int mode) { WITH_STREAM(PLAIN, status = begin_capture(stream, mode)); }
int cuStreamEndCapture(void *stream_handle, struct object **graph) {
    WITH_STREAM(PLAIN | TIDY, status = end_capture(stream, graph));
}
int cuGraphDestroy(void *handle) {
    WITH(GRAPH, INIT, INVALID_VALUE, if (object->origin) status = INVALID_VALUE; else destroy(object, live_graphs));
}
int cuGraphInstantiateWithFlags(struct object **exec, void *handle, unsigned long long flags) {
    WITH(GRAPH, PLAIN, INVALID_VALUE, (void)flags; status = instantiate(object, exec));
}
int cuGraphInstantiateWithParams(struct object **exec, void *handle, uint64_t params[4]) {
    WITH(GRAPH, PLAIN, INVALID_VALUE, params[2] = params[3] = 0; status = instantiate(object, exec));  // no failed node
}
int cuGraphExecDestroy(void *handle) { WITH(EXEC, INIT, INVALID_VALUE, destroy(object, live_graph_execs)); }
int cuGraphUpload(void *handle, void *stream_handle) {
    WITH_STREAM(PLAIN, if (!find(handle, EXEC)) status = INVALID_VALUE);
}
int cuGraphLaunch(void *handle, void *stream_handle) {
    WITH_STREAM(PLAIN, struct object *exec = find(handle, EXEC); status = exec ? launch(exec, stream) : INVALID_VALUE);
}

// How cuda.bindings finds all of these: by name, and by the version of CUDA whose form of the function it wants.
int cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *found) {
    static const char *forms[] = {"_v3", "_v2", ""};
    Dl_info self;
    char name[100];
    (void)flags;
    *function = NULL;
    if (dladdr(&lock, &self) && !strncmp(symbol, "cu", 2))
        for (int i = version < 12030; i < 3 && !*function; i++) {  // 12.3 brought the one _v3 that is here
            snprintf(name, sizeof name, "%s%s", symbol, forms[i]);
            *function = dlsym(dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD), name);
        }
    if (found) *found = !*function;
    return *function ? SUCCESS : NOT_FOUND;
}

// The simulation's own functions; these may be called from a host function

uint64_t sim_count(const char *what) {
    static const char *names[] = {
#define X(name) #name,
        COUNTS(X)
#undef X
    };
    uint64_t value = UINT64_MAX;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < COUNT_OF_COUNTS; i++)
        if (!strcmp(names[i], what)) value = counts[i];
    pthread_mutex_unlock(&lock);
    return value;
}

uint64_t sim_setting(const char *what) {
    for (int i = 0; i < COUNT_OF_SETTINGS; i++)
        if (!strcmp(settings[i].name, what)) return settings[i].value;
    return UINT64_MAX;
}

int sim_set(const char *what, uint64_t value) {
    for (int i = 0; i < COUNT_OF_SETTINGS; i++)
        if (!strcmp(settings[i].name, what)) return settings[i].value = value, 0;
    return 1;
}

void sim_misuse(const char *where, const char *what) {
    pthread_mutex_lock(&lock);
    complain(where, what);
    pthread_mutex_unlock(&lock);
}

const char *sim_last_misuse(void) { return complaint; }

void *sim_shadow(uint64_t pointer) {
    pthread_mutex_lock(&lock);
    uint8_t *address = reach(pointer, 0, NULL);
    pthread_mutex_unlock(&lock);
    return address;
}

// For the stand-in's kernels: like sim_shadow for a whole range, and a fault of the device where a kernel's would be.
void *sim_access(uint64_t pointer, uint64_t size) {
    int pageable;
    pthread_mutex_lock(&lock);
    uint8_t *address = reach(pointer, size, &pageable);
    if (pageable) address = NULL;
    if (!address) {
        complain("a kernel", "not inside one living allocation");
        if (running) running->device->broken = ILLEGAL_ADDRESS;
    }
    pthread_mutex_unlock(&lock);
    return address;
}
