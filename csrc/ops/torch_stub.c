// An empty library that stands in for libtorch.so at link time and is never installed. Linking it
// records libtorch.so as needed, without tying the binary to one torch.
int simpo_ext_torch_stub;
