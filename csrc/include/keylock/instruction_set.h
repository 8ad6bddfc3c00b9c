// The CPU instruction sets a kernel may be compiled for, narrowest first.
#pragma once

namespace keylock {

enum class InstructionSet { portable, avx2, avx512, avx512_bf16 };

// Whether this build holds the kernels for it.
bool is_compiled(InstructionSet set);

// Whether this build holds them and this machine can run them.
bool is_usable(InstructionSet set);

}  // namespace keylock
