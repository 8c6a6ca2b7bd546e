// AVX, AVX2 and FMA kernels whose results are printed as hashes of their bits.
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 4096 };
static uint8_t bytes[N + 64] __attribute__((aligned(64)));
static float reals[N];
static double doubles[N];
static int32_t words[N];

static void show(const char *name, const void *data, size_t size) {
    const unsigned char *p = data;
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < size; i++) hash = (hash ^ p[i]) * 0x100000001b3u;
    printf("%s %016lx\n", name, hash);
}

static void fill(void) {
    uint32_t s = 12345;
    for (int i = 0; i < N; i++) {
        s = s * 1664525 + 1013904223;
        bytes[i] = s >> 24;
        words[i] = (int32_t)s;
        reals[i] = (int32_t)s * 1e-5f;
        doubles[i] = (int32_t)s * 1e-7;
    }
}

static void integers(void) {
    static __m256i out[N / 32];
    __m256i sum = _mm256_setzero_si256();
    for (int shift = 0; shift < 32; shift++) {
        for (int i = 0; i < N / 32; i++) {
            // unaligned, and across lines and pages
            __m256i x = _mm256_loadu_si256((const __m256i *)(bytes + i * 32 + shift));
            __m256i y = _mm256_shuffle_epi8(x, _mm256_set1_epi8(shift & 15));
            y = _mm256_add_epi8(y, _mm256_alignr_epi8(x, sum, 5));
            y = _mm256_maddubs_epi16(y, x);
            y = _mm256_permutevar8x32_epi32(y, _mm256_and_si256(x, _mm256_set1_epi32(7)));
            y = _mm256_sllv_epi32(y, _mm256_and_si256(x, _mm256_set1_epi32(31)));
            y = _mm256_xor_si256(y, _mm256_mul_epu32(x, y));
            sum = _mm256_add_epi64(sum, _mm256_sad_epu8(x, y));
            out[i] = _mm256_blendv_epi8(y, sum, x);
        }
        sum = _mm256_add_epi32(sum, _mm256_set1_epi32(_mm256_movemask_epi8(sum)));
    }
    show("integers", out, sizeof out);
    show("sum", &sum, sizeof sum);
}

static void floats(void) {
    static float out[N];
    static double wide[N];
    for (int i = 0; i + 8 <= N; i += 8) {
        __m256 x = _mm256_loadu_ps(reals + i);
        __m256 y = _mm256_fmadd_ps(x, _mm256_set1_ps(1.25f), _mm256_set1_ps(-3.0f));
        y = _mm256_div_ps(y, _mm256_add_ps(_mm256_sqrt_ps(_mm256_mul_ps(x, x)), _mm256_set1_ps(1)));
        y = _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, y, _CMP_LT_OQ));
        y = _mm256_dp_ps(y, x, 0xf1);
        _mm256_storeu_ps(out + i, _mm256_round_ps(y, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
    }
    for (int i = 0; i + 4 <= N; i += 4) {
        __m256d x = _mm256_loadu_pd(doubles + i);
        __m256d y = _mm256_fnmsub_pd(x, x, _mm256_permute4x64_pd(x, 0x1b));
        _mm256_storeu_pd(wide + i, _mm256_hadd_pd(y, _mm256_sqrt_pd(_mm256_mul_pd(y, y))));
    }
    show("floats", out, sizeof out);
    show("doubles", wide, sizeof wide);
}

static void masked(void) {
    static int32_t out[N];
    for (int i = 0; i + 8 <= N; i += 8) {
        __m256i index = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(words + i)), _mm256_set1_epi32(N - 1));
        __m256i mask = _mm256_loadu_si256((const __m256i *)(words + (i ^ 8)));
        __m256i x = _mm256_mask_i32gather_epi32(_mm256_set1_epi32(i), words, index, mask, 4);
        _mm256_maskstore_epi32(out + i, mask, x);
        x = _mm256_maskload_epi32(words + i, x);
        _mm256_maskstore_epi32(out + (i ^ 16), x, _mm256_add_epi32(x, index));
    }
    show("masked", out, sizeof out);
}

static void modes(void) {
    static float out[N];
    for (int rounding = 0; rounding < 4; rounding++) {
        _mm_setcsr(0x1f80 | rounding << 13 | (rounding & 1 ? 0x8040 : 0));
        for (int i = 0; i + 8 <= N; i += 8) {
            __m256 x = _mm256_mul_ps(_mm256_loadu_ps(reals + i), _mm256_set1_ps(1e-38f));
            x = _mm256_mul_ps(x, _mm256_set1_ps(1e-5f));
            __m256i n = _mm256_cvtps_epi32(_mm256_loadu_ps(reals + i));
            x = _mm256_add_ps(x, _mm256_cvtepi32_ps(n));
            _mm256_storeu_ps(out + i, x);
        }
        uint32_t csr = _mm_getcsr();
        printf("mxcsr %08x\n", csr);
        show("rounded", out, sizeof out);
    }
    _mm_setcsr(0x1f80);
    __m128i half[N / 8];
    for (int i = 0; i + 8 <= N; i += 8) half[i / 8] = _mm256_cvtps_ph(_mm256_loadu_ps(reals + i), 0);
    show("halves", half, sizeof half);
}

static void scalar(void) {
    uint64_t x = 0x123456789abcdef1u, sum = 0;
    for (int i = 0; i < 100000; i++) {
        x ^= x << 13; x ^= x >> 7; x ^= x << 17;
        sum += _pext_u64(x, 0x0f0f00ff00ff0f0fu) ^ _pdep_u64(x, 0xff00f0f00f0fff00u);
        sum += _lzcnt_u64(x) + _tzcnt_u64(x) * 3 + _mm_popcnt_u64(x) * 7;
        sum ^= _bextr_u64(x, 5, 20) + _bzhi_u64(x, i & 63) + _andn_u64(x, sum) + (x >> 11 | x << 53);
        sum = _mm_crc32_u64(sum, x) + sum * 3;
    }
    printf("scalar %016lx\n", sum);
}

int main(void) {
    fill();
    integers();
    floats();
    masked();
    modes();
    scalar();
    return 0;
}
