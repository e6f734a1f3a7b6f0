// SPDX-License-Identifier: MIT
#pragma once

#include <colt5/colt5.hpp>
#include <colt5/io/adamw.hpp>
#include <colt5/io/dlpack.hpp>
#include <colt5/io/npy.hpp>
#include <colt5/io/parameters.hpp>
#include <colt5/io/safetensors.hpp>
#include <colt5/io/training.hpp>
#include <vector>

constexpr colt5::FeedForwardConfig config{.dim = 8, .num_heavy_tokens = 2};

std::vector<float> values_in_one();
std::vector<float> values_in_two();
