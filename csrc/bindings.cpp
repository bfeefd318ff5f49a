// rootfree_kernels._C: how the extension was built, for `python -m rootfree_kernels` and bug reports.
//
// Only build information goes through pybind11. The operators are registered with TORCH_LIBRARY_IMPL beside their
// kernels in cpu/ and cuda/, so that torch.compile and opcheck see them. setup.py compiles all of it into this module.
// This file includes no header of PyTorch but its version, so that it compiles in seconds.

#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#ifdef ROOTFREE_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

std::string cxx_standard() {
#ifdef _MSVC_LANG  // MSVC reports C++98 in __cplusplus
  constexpr long version = _MSVC_LANG;
#else
  constexpr long version = __cplusplus;
#endif
  return version > 202002L ? "C++23" : version > 201703L ? "C++20" : "C++17";
}

std::string cuda_version() {
#ifdef ROOTFREE_WITH_CUDA
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
  return "none";
#endif
}

std::string build_type() {
#ifdef NDEBUG
  return "release";
#else
  return "debug";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["cxx_standard"] = cxx_standard();
  info["torch"] = TORCH_VERSION;
  info["cuda"] = cuda_version();
  info["build_type"] = build_type();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled extension of rootfree_kernels.";
  m.def("build_info", &build_info,
        "Compiler, C++ standard, build type, and the versions of PyTorch and CUDA this was compiled against "
        "(CUDA is \"none\" without it), as strings.");
}
