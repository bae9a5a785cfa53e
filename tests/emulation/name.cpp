// What a library for the emulated devices says of itself; all else is in the one behind it.
extern "C" __attribute__((visibility("default"))) const char* kh_platform(void) { return "musa"; }
