#pragma once

// The CPU kernels for a C++ program: no torch, no Python. Compile every .cpp file of csrc/cpu (without example/) with
// -I csrc, -O3 and -ffp-contract=off, which the bits depend on. csrc/cpu/example/expert_layer.cpp is a whole program.
//
// Each op is a struct of pointers, sizes and strides, filled by name, and a function that takes it with an Executor:
//
//   grok::cpu::ThreadPool threads;  // or an Executor of your own
//   grok::cpu::RmsNorm p{};
//   p.x = x;
//   ...
//   grok::cpu::rms_norm(p, threads);
//
// Functions return when the result is there. They throw std::invalid_argument for arguments whose values would lead
// outside of the arrays, and trust the pointers, sizes and strides. They may be called from several threads at the
// same time, if the executor allows it. Every op gives the same bits on any number of threads.

#include "cpu/attention/attention.h"   // paged_attention
#include "cpu/executor.h"              // the interface to the threads
#include "cpu/gemm/gather_rows.h"      // gather_rows: single rows of a weight, as of an embedding
#include "cpu/gemm/grouped_gemm.h"     // grouped_gemm: the products, dense or by expert
#include "cpu/gemm/pack_weight.h"      // pack_weight: the layout that products read fastest
#include "cpu/isa.h"                   // which instruction set runs
#include "cpu/moe/moe.h"               // moe, moe_up, moe_down: the expert layer and its halves
#include "cpu/norm.h"                  // rms_norm, sandwich_norm
#include "cpu/quantize.h"              // quantize_rows: activations to int8 or e4m3
#include "cpu/rope.h"                  // rope_store_kv
#include "cpu/route.h"                 // route_topk, group_tokens
#include "cpu/sample.h"                // sample_top_p
#include "cpu/thread_pool.h"           // an executor for programs without threads of their own
