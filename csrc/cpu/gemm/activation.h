#pragma once

namespace grok::cpu {

enum class Activation { gelu_tanh, gelu, silu };  // gelu: by erf

}  // namespace grok::cpu
