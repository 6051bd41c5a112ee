typedef unsigned int uint32;
typedef unsigned char uint8;
typedef unsigned long long int uint64;
typedef int int32;

struct __align__(16) float_4 {
float i_0;
float i_1;
float i_2;
float i_3;
};
#include <cuda_fp16.h>


inline __device__ void
__mma_m16n8k16___half___half_float(uint32 const &reg_a_0, uint32 const &reg_a_1, uint32 const &reg_a_2, uint32 const &reg_a_3, uint32 const &reg_b_0, uint32 const &reg_b_1, float const &reg_c_0, float const &reg_c_1, float const &reg_c_2, float const &reg_c_3, float &reg_d_0, float &reg_d_1, float &reg_d_2, float &reg_d_3) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
               : "=f"(reg_d_0), "=f"(reg_d_1), "=f"(reg_d_2), "=f"(reg_d_3)
               : "r"(reg_a_0), "r"(reg_a_1), "r"(reg_a_2), "r"(reg_a_3), "r"(reg_b_0), "r"(reg_b_1), "f"(reg_c_0), "f"(reg_c_1), "f"(reg_c_2), "f"(reg_c_3));
    }


inline __device__ void
__ldmatrix_m8n8___half_4x(uint32 &reg_0, uint32 &reg_1, uint32 &reg_2, uint32 &reg_3, void const *row_addr) {
  uint32 addr = static_cast<uint32>(__cvta_generic_to_shared(row_addr));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16"
               " {%0, %1, %2, %3}, [%4];"
               : "=r"(reg_0), "=r"(reg_1), "=r"(reg_2), "=r"(reg_3)
               : "r"(addr));
    }


extern "C" __global__ void __launch_bounds__(32)generated_kernel (
float* buffer_0
) {
extern __shared__ __align__(16) uint8 dynamic_shared_mem[];
__half* shared_memory_0 = reinterpret_cast<__half*>(&dynamic_shared_mem[0]);
float* shared_memory_1 = reinterpret_cast<float*>(&dynamic_shared_mem[1024]);
uint32 threadIdxGlobal = threadIdx.x;
for (uint32 i = 0; i < 8; ++i) {
shared_memory_0[threadIdxGlobal * 8 + i] = __half(1.0f);
}
shared_memory_1[threadIdxGlobal] = float(threadIdxGlobal);
float l_0 = shared_memory_1[(threadIdxGlobal + 1) % 32];
buffer_0[threadIdxGlobal] = l_0;
bool l_1;
l_1 = bool([&]() -> uint32 {
    uint32 pred = 0;
    asm volatile(
        "{\n"
        "     .reg .pred %%px;\n"
        "     elect.sync _|%%px, 0xffffffff;\n"
        "     selp.b32 %0, 1, 0, %%px;\n"
        "}\n"
        : "+r"(pred));
    return pred;
        }());
uint32 a[4], b[2];
__ldmatrix_m8n8___half_4x(reinterpret_cast<uint32&>(a[0]), reinterpret_cast<uint32&>(a[1]), reinterpret_cast<uint32&>(a[2]), reinterpret_cast<uint32&>(a[3]), shared_memory_0 + threadIdxGlobal * 8);
__half two[2] = {__half(2.0f), __half(2.0f)};
b[0] = b[1] = reinterpret_cast<uint32&>(two[0]);
float c[4] = {0, 0, 0, 0}, d[4];
__mma_m16n8k16___half___half_float(a[0], a[1], a[2], a[3], b[0], b[1], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]);
float l_2 = __shfl_sync(-1, l_1 ? 0.0f : 1.0f, 0);
for (uint32 i = 0; i < 4; ++i) {
buffer_0[32 + threadIdxGlobal * 4 + i] = d[i] + l_2;
}
}
