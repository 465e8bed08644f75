// An empty stand-in for libtorch.so at link time. Linking it records libtorch.so as needed without
// linking torch, whichever torch is there at run time; it is never installed.
int simpo_ext_torch_stub;
