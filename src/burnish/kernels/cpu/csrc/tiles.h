// Intel's matrix tiles (AMX): 16 rows of 64 bytes each, eight of them, once they are configured.
#pragma once

#include <cstddef>
#include <cstdint>

namespace burnish {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64;
constexpr size_t kTileSize = kTileRows * kTileBytes;

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

const TileConfig& tile_config() {
  static const TileConfig config;
  return config;
}

// The compilers' own intrinsic tells them of 8 of the 64 bytes it reads, so that they may drop the others.
void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }

// Others in this process use the tiles too (torch's oneDNN): their configuration is put back.
class Tiles {
 public:
  Tiles() {
    __asm__ volatile("sttilecfg %0" : "=m"(before_));
    configure(tile_config());
  }
  ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      configure(before_);
    }
  }

 private:
  TileConfig before_;
};

}  // namespace
}  // namespace burnish
