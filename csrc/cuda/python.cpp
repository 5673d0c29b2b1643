// The module curveball_fused._C_cuda. Importing it loads the library, which registers the CUDA kernels of the operators
// that _C declares; the module itself only tells how it was built. Python's limited API, as in ../cpu/python.cpp.
#include <Python.h>
#include <cuda_runtime_api.h>
#include <torch/headeronly/version.h>

#include <string>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                 "_C_cuda",
                                 "The CUDA kernels of curveball_fused.",
                                 -1,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr};

PyMODINIT_FUNC PyInit__C_cuda(void) {
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  const std::string cuda_version =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  if (PyModule_AddStringConstant(module, "CUDA_VERSION", cuda_version.c_str()) ||
      PyModule_AddStringConstant(module, "ARCHITECTURES", CURVEBALL_ARCHITECTURES) ||
      PyModule_AddStringConstant(module, "TORCH_VERSION", TORCH_VERSION)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
