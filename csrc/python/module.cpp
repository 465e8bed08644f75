// simpo_ext._C: facts about the binary. It handles no tensors and includes no torch header: tensors
// reach the ops through torch.ops. Importing it loads the op library, which registers the ops.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ops/build_info.h"
#include "simpo_ext/error_tags.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    const simpo_ext::BuildInfo info = simpo_ext::build_info();
    py::dict result;
    result["version"] = info.version;
    result["compiler"] = info.compiler;
    result["cpu_capability"] = info.cpu_capability;
    result["torch_target"] = info.torch_target;
    result["cuda_archs"] = info.cuda_archs;
    result["cuda_runtime_version"] = info.cuda_runtime_version;
    result["pybind11"] =
        PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
    return result;
  });
  m.def("cpu_capabilities", &simpo_ext::cpu_capabilities);
  m.def("cuda_device_count", &simpo_ext::cuda_device_count);
  m.attr("INDEX_ERROR_TAG") = simpo_ext::kIndexErrorTag;
  m.attr("VALUE_ERROR_TAG") = simpo_ext::kValueErrorTag;
}
