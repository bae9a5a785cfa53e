// SPDX-License-Identifier: Apache-2.0
// What a library says of itself.
#include "launcher.muh"

KH_EXPORT int32_t kh_abi_version(void) { return KH_ABI_VERSION; }
KH_EXPORT const char* kh_abi_fingerprint(void) { return KH_ABI_FINGERPRINT; }
KH_EXPORT const char* kh_platform(void) { return KH_PLATFORM; }
KH_EXPORT int32_t kh_warp_size(void) { return KH_WARP_SIZE; }
KH_EXPORT const char* kh_last_error(void) { return kh::error_text; }
