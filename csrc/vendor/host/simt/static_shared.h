// SPDX-License-Identifier: Apache-2.0
// Where the kernels' static __shared__ variables lie, so that a block can start with them
// undefined. Being `static thread_local` without initial values, they are the part of the library's
// thread-local segment that is not in its file (.tbss). Whatever else lies there, such as a
// launcher's text of errors, is put back when a launch ends.
//
// With KH_SIMT_SERIAL they are plain statics, among much else, and are left alone.
#pragma once
#include <link.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "fiber.h"

namespace simt {

struct Memory {
  unsigned char* first = nullptr;
  size_t bytes = 0;
};

// The bytes an undefined variable has: NaN in every floating type, -1 in every signed integer.
constexpr int kUndefined = 0xff;

// That memory in the calling OS thread, as the library's program headers have it.
inline Memory find_static_shared() {
  os_thread.initialised = 1;  // the segment is allocated at a thread's first access
  Memory found;
  auto look = [](dl_phdr_info* info, size_t, void* out) {
    static const char here = 0;
    bool ours = false;
    const ElfW(Phdr)* tls = nullptr;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const ElfW(Phdr)& part = info->dlpi_phdr[i];
      const uintptr_t first = info->dlpi_addr + part.p_vaddr;
      const uintptr_t at = reinterpret_cast<uintptr_t>(&here);
      if (part.p_type == PT_LOAD && at >= first && at < first + part.p_memsz) ours = true;
      if (part.p_type == PT_TLS) tls = &part;
    }
    if (!ours) return 0;
    if (tls != nullptr && info->dlpi_tls_data != nullptr)
      *static_cast<Memory*>(out) = {
          static_cast<unsigned char*>(info->dlpi_tls_data) + tls->p_filesz,
          tls->p_memsz - tls->p_filesz};
    return 1;
  };
  dl_iterate_phdr(look, &found);
  return found;
}

// Where it lies as seen from `os_thread`, the same in every OS thread. Found when the library is
// loaded: the search takes a lock that a forked child may find held for ever.
struct StaticSharedPlace {
  ptrdiff_t distance = 0;
  size_t bytes = 0;
};
inline const StaticSharedPlace static_shared_place = [] {
  const Memory here = find_static_shared();
  return StaticSharedPlace{here.first - reinterpret_cast<unsigned char*>(&os_thread), here.bytes};
}();

// The static shared memory of the calling OS thread, for as long as it runs blocks.
class StaticShared {
 public:
  StaticShared()
      : memory_{reinterpret_cast<unsigned char*>(&os_thread) + static_shared_place.distance,
                static_shared_place.bytes} {
    kept_.assign(memory_.first, memory_.first + memory_.bytes);
  }
  ~StaticShared() {
    if (!kept_.empty()) memcpy(memory_.first, kept_.data(), kept_.size());
  }
  StaticShared(const StaticShared&) = delete;
  StaticShared& operator=(const StaticShared&) = delete;

  void undefine() {
    if (!kept_.empty()) memset(memory_.first, kUndefined, kept_.size());
  }

 private:
  Memory memory_;
  std::vector<unsigned char> kept_;
};

}  // namespace simt
