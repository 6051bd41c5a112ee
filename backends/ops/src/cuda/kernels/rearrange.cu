// Transposes the tensors of a convolution for tensor cores: channels last, padded with zeros to a
// multiple of 8.
//
// Images [image][channel][pixel] become [image][pixel][channel], weights [out][channel][tap] become
// [out][tap][channel]. Macros: T, a 16-bit type.

struct Info {
    u64 outer;     // images, or rows of the weight
    u64 channels;
    u64 padded;    // channels, rounded up to a multiple of 8
    u64 inner;     // pixels, or taps
};

// A block of 256 threads transposes a tile of 32 channels × 32 inner positions.
extern "C" __global__ void __launch_bounds__(256)
channels_last(const T *__restrict__ from, T *__restrict__ to, const __grid_constant__ Info info) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    T *tile = (T *)shared_memory;
    constexpr int STRIDE = 33;
    const int x = threadIdx.x % 32, y = threadIdx.x / 32;
    const int channels = (int)info.channels, padded = (int)info.padded;
    const u64 inner = info.inner, first_inner = (u64)blockIdx.x * 32;
    const int first_channel = blockIdx.y * 32;
    from += blockIdx.z * info.channels * inner;
    to += blockIdx.z * info.padded * inner;
#pragma unroll
    for (int i = 0; i < 32; i += 8) {
        const int channel = first_channel + y + i;
        const bool valid = channel < channels && first_inner + x < inner;
        tile[(y + i) * STRIDE + x] = valid ? from[channel * inner + first_inner + x] : Rounded<T>::of(0.0f);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 32; i += 8) {
        const int channel = first_channel + x;
        if (channel < padded && first_inner + y + i < inner)
            to[(first_inner + y + i) * padded + channel] = tile[x * STRIDE + y + i];
    }
}
