/* Stand-ins for libnvidia-ml.so.1 and libamd_smi.so: the functions that our readers call, answering from a text file named by
   FAKE_COUNTERS. A line is "index value": millijoules for NVML, accumulator for AMD SMI (resolution 15.259 uJ). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdint.h>

static int rows(unsigned long long *out) {
    FILE *f = fopen(getenv("FAKE_COUNTERS"), "r");
    int n = 0, index;
    unsigned long long value;
    if (!f) return -1;
    while (fscanf(f, "%d %llu", &index, &value) == 2 && n < 16) out[n++] = value;
    fclose(f);
    return n;
}

int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { unsigned long long v[16]; int k = rows(v); if (k < 0) return 999; *n = k; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)(uintptr_t)(i + 1); return 0; }
int nvmlDeviceGetUUID(void *h, char *text, unsigned size) {
    snprintf(text, size, "GPU-0000000%d-aaaa-bbbb-cccc-dddddddddddd", (int)(uintptr_t)h - 1);
    return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *e) {
    unsigned long long v[16];
    int k = rows(v), i = (int)(uintptr_t)h - 1;
    if (k < 0 || i >= k) return 3; /* NOT_SUPPORTED */
    *e = v[i];
    return 0;
}

int amdsmi_init(uint64_t flags) { return flags == 2 ? 0 : 1; }
int amdsmi_get_socket_handles(uint32_t *n, void **h) { /* one socket a die, as ROCm reports GCDs */
    unsigned long long v[16];
    int k = rows(v);
    if (k < 0) return 1;
    if (h) for (int i = 0; i < (int)*n && i < k; i++) h[i] = (void *)(uintptr_t)(i + 1);
    *n = k;
    return 0;
}
int amdsmi_get_processor_handles(void *socket, uint32_t *n, void **h) { if (h) h[0] = socket; *n = 1; return 0; }
int amdsmi_get_gpu_device_bdf(void *h, uint64_t *bdf) { *bdf = (uint64_t)(0xc0 + (uintptr_t)h) << 8; return 0; }
int amdsmi_get_energy_count(void *h, uint64_t *e, float *resolution, uint64_t *stamp) {
    unsigned long long v[16];
    int k = rows(v), i = (int)(uintptr_t)h - 1;
    if (k < 0 || i >= k) return 2;
    *e = v[i];
    *resolution = 15.259f;
    *stamp = 0;
    return 0;
}
