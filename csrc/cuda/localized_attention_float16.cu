#include "attention_launch.h"

namespace keylock::cuda {

template Status attend<Half>(const LocalizedAttention& op, void* stream);

}  // namespace keylock::cuda
