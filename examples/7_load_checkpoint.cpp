// SPDX-License-Identifier: MIT
// Exchanges parameters with the PyTorch package: the names are those of its state_dict. In Python:
//     safetensors.torch.save_file(block.state_dict(), "block.safetensors")
// Usage: 7_load_checkpoint [block.safetensors]; without an argument it writes a file first.
#include <colt5/colt5.hpp>
#include <colt5/io/parameters.hpp>

#include <cstdio>
#include <filesystem>
#include <string>

int main(int count, char** arguments) {
    using namespace colt5;
    constexpr TransformerBlockConfig config{.dim = 32,
                                            .num_heavy_attn_tokens_q = 16,
                                            .num_heavy_attn_tokens_kv = 16,
                                            .num_heavy_ff_tokens = 16,
                                            .light_dim_head = 8,
                                            .light_heads = 4,
                                            .heavy_dim_head = 8,
                                            .heavy_heads = 4};
    using Block = ConditionalRoutedTransformerBlock<config, float, Cpu>;
    Cpu policy;
    std::filesystem::path path = std::filesystem::temp_directory_path() / "colt5_example.safetensors";
    if (count > 1)
        path = arguments[1];
    else
        save_parameters(policy, path, Block{policy, Seed{7}});
    try {
        // [checkpoint]
        Block block{policy};
        load_parameters(policy, path, block);  // all or nothing; float32, float64, bfloat16 and float16 convert
        // [checkpoint]
        Block::each_parameter(
            [](const std::string& name, const auto& value) {
                std::printf("%-45s %6td numbers, norm %g\n", name.c_str(), value.size(), value.vector().norm());
            },
            "", block);
    } catch (const FileError& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    if (count == 1) std::filesystem::remove(path);
}
