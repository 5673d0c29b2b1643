// The module curveball_fused._C. Importing it loads the library, which registers the operators with torch; the
// module itself only tells how it was built. Python's limited API: one binary for Python 3.10 and later.
#include <Python.h>
#include <torch/headeronly/version.h>

#include "kernels.h"

#if defined(__clang__)
#define CURVEBALL_COMPILER __VERSION__  // says "Clang" itself
#else
#define CURVEBALL_COMPILER "GCC " __VERSION__
#endif

static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                 "_C",
                                 "The native operators of curveball_fused.",
                                 -1,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr};

PyMODINIT_FUNC PyInit__C(void) {
  const curveball::cpu::Kernels* kernels = curveball::cpu::kernels();
  if (!kernels) {
    PyErr_Format(PyExc_ImportError,
                 "CURVEBALL_INSTRUCTION_SET names an instruction set that this build or this processor does not "
                 "have. Unset it, or choose one of: %s",
                 curveball::cpu::compiled_instruction_sets());
    return nullptr;
  }
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  if (PyModule_AddStringConstant(module, "COMPILER", CURVEBALL_COMPILER) ||
      PyModule_AddStringConstant(module, "TORCH_VERSION", TORCH_VERSION) ||
      PyModule_AddStringConstant(module, "INSTRUCTION_SETS", curveball::cpu::compiled_instruction_sets()) ||
      PyModule_AddStringConstant(module, "INSTRUCTION_SET", kernels->name)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
