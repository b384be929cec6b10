/* classify_c BUNDLE FRAME WIDTH HEIGHT: the most probable class of a file of raw RGB bytes. In C, to show its ABI. */
#include <stdio.h>
#include <stdlib.h>

#include "rxdeploy.h"

#define DO(call)                                                      \
    do {                                                              \
        if ((call) != RXDEPLOY_OK) {                                  \
            fprintf(stderr, "%s\n", rxdeploy_last_error());           \
            return 1;                                                 \
        }                                                             \
    } while (0)

int main(int count, char **arguments) {
    if (count != 5) return fprintf(stderr, "usage: %s BUNDLE FRAME WIDTH HEIGHT\n", arguments[0]), 2;
    size_t width = strtoul(arguments[3], NULL, 10), height = strtoul(arguments[4], NULL, 10);
    if (!width || !height || width > 20000 || height > 20000) return fprintf(stderr, "no such size\n"), 2;
    uint8_t *pixels = malloc(width * height * 3);
    FILE *file = fopen(arguments[2], "rb");
    if (!pixels || !file || fread(pixels, width * 3, height, file) != height)
        return fprintf(stderr, "%s cannot be read\n", arguments[2]), 2;
    fclose(file);

    rxdeploy_session *session;
    rxdeploy_info info = {.size = sizeof info};
    DO(rxdeploy_open(arguments[1], NULL, &session));
    DO(rxdeploy_get_info(session, &info));
    uint8_t *image = malloc(info.image_bytes);
    float *logits = malloc(info.classes * sizeof *logits);
    if (!image || !logits) return fprintf(stderr, "out of memory\n"), 1;
    rxdeploy_frame frame = {.data = pixels, .width = width, .height = height, .pixels = RXDEPLOY_RGB};
    rxdeploy_prediction best;
    DO(rxdeploy_preprocess(session, &frame, image));
    DO(rxdeploy_run(session, image, 1, logits));
    DO(rxdeploy_top(session, logits, 1, 1, &best));
    const char *label = rxdeploy_label(session, best.index);
    printf("%zu %s %.4f\n", best.index, label ? label : "", best.probability);
    rxdeploy_free(session);
    free(logits), free(image), free(pixels);
    return 0;
}
