// SPDX-License-Identifier: Apache-2.0
// The fast path from Python to a compiled kernel: a callable that packs its arguments into the
// kernel's argument struct and calls it. It reads tensors through DLPack's C exchange interface,
// which torch offers from 2.10 on, so it needs no torch header and serves every device type.
//
// kernelhub/backends/native/library.py has the same in ctypes, for where this cannot be built.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <kernelhub/abi.h>
#include <stddef.h>
#include <string.h>

// ---- DLPack 1.x, the parts used here ---------------------------------------------------------

typedef struct {
  int32_t type;
  int32_t index;
} dl_device;

typedef struct {
  void* data;
  dl_device device;
  int32_t ndim;
  struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} dl_tensor;

typedef struct {
  struct {
    uint32_t major, minor;
    void* older;
  } header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, dl_tensor* out);
  int (*current_stream)(int32_t device_type, int32_t index, void** out);
} dl_exchange;

// ---- the callable ----------------------------------------------------------------------------

enum { kMaxFields = 32 };

// Kinds of fields, as letters of the `kinds` argument.
enum { kTensor = 't', kInt64 = 'q', kFloat64 = 'd' };

typedef int32_t (*kernel_function)(const void* args, void* stream);

typedef struct {
  PyObject_HEAD vectorcallfunc vectorcall;
  kernel_function kernel;
  const char* (*last_error)(void);
  const dl_exchange* exchange;
  PyObject* capsule;      // keeps `exchange` alive
  PyObject* tensor_type;  // torch.Tensor
  PyObject* error_type;   // raised with the kernel's text
  PyObject* stream_of;    // device index to stream, or None: ask `exchange`
  PyObject* owner;        // keeps the library loaded
  PyObject* name;         // of the op, for messages
  int32_t device_type;    // DLPack's code
  Py_ssize_t num_fields;
  char kinds[kMaxFields];
} Launcher;

static size_t field_bytes(char kind) { return kind == kTensor ? sizeof(kh_tensor) : 8; }

// Packs one tensor. The first sets the device of the call; all others must be on it.
static int pack_tensor(const Launcher* self, Py_ssize_t position, PyObject* value, kh_tensor* out,
                       int64_t* device) {
  memset(out, 0, sizeof(*out));
  if (value == Py_None) return 0;
  if (!PyObject_TypeCheck(value, (PyTypeObject*)self->tensor_type)) {
    PyErr_Format(PyExc_TypeError, "%U: argument %zd: expected a tensor, got %s", self->name,
                 position, Py_TYPE(value)->tp_name);
    return -1;
  }
  dl_tensor t;
  if (self->exchange->tensor_from_object(value, &t) != 0) {
    if (!PyErr_Occurred())
      PyErr_Format(self->error_type, "%U: argument %zd has no memory to hand to a kernel",
                   self->name, position);
    return -1;
  }
  if (t.ndim > KH_MAX_DIMS) {
    PyErr_Format(self->error_type, "%U: argument %zd: expected at most %d dimensions, got %d",
                 self->name, position, KH_MAX_DIMS, (int)t.ndim);
    return -1;
  }
  // CPU tensors carry index 0 in DLPack and need none here.
  if (t.device.type != self->device_type || (*device >= 0 && t.device.index != *device)) {
    PyErr_Format(self->error_type, "%U: argument %zd is on another device than the kernel",
                 self->name, position);
    return -1;
  }
  *device = t.device.index;
  out->data = t.data == NULL ? NULL : (char*)t.data + t.byte_offset;
  out->dtype = t.dtype.code << 8 | t.dtype.bits;
  out->ndim = t.ndim;
  for (int i = 0; i < t.ndim; ++i) {
    out->shape[i] = t.shape[i];
    out->stride[i] = t.strides[i];
  }
  return 0;
}

static int current_stream(const Launcher* self, int64_t device, void** stream) {
  if (self->stream_of == Py_None)
    return self->exchange->current_stream(self->device_type, (int32_t)device, stream);
  PyObject* index = PyLong_FromLongLong(device);
  if (index == NULL) return -1;
  PyObject* handle = PyObject_CallOneArg(self->stream_of, index);
  Py_DECREF(index);
  if (handle == NULL) return -1;
  *stream = PyLong_AsVoidPtr(handle);
  Py_DECREF(handle);
  return PyErr_Occurred() ? -1 : 0;
}

static PyObject* launch(PyObject* callable, PyObject* const* values, size_t flags,
                        PyObject* names) {
  Launcher* self = (Launcher*)callable;
  const Py_ssize_t count = PyVectorcall_NARGS(flags);
  if (names != NULL || count != self->num_fields) {
    PyErr_Format(PyExc_TypeError, "%U: expected %zd positional arguments, got %zd", self->name,
                 self->num_fields, count);
    return NULL;
  }
  // Room for the largest struct; a union for its alignment.
  union {
    int64_t device;
    char bytes[sizeof(int64_t) + kMaxFields * sizeof(kh_tensor)];
  } args;
  int64_t device = -1;
  char* at = args.bytes + sizeof(int64_t);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (self->kinds[i] == kTensor) {
      if (pack_tensor(self, i, values[i], (kh_tensor*)at, &device) != 0) return NULL;
    } else if (self->kinds[i] == kInt64) {
      const int64_t number = PyLong_AsLongLong(values[i]);
      if (number == -1 && PyErr_Occurred()) return NULL;
      memcpy(at, &number, sizeof(number));
    } else {
      const double number = PyFloat_AsDouble(values[i]);
      if (number == -1.0 && PyErr_Occurred()) return NULL;
      memcpy(at, &number, sizeof(number));
    }
    at += field_bytes(self->kinds[i]);
  }
  args.device = device < 0 ? 0 : device;
  void* stream = NULL;
  if (current_stream(self, args.device, &stream) != 0) {
    if (!PyErr_Occurred()) PyErr_Format(self->error_type, "%U: no current stream", self->name);
    return NULL;
  }
  int32_t code;
  Py_BEGIN_ALLOW_THREADS;
  code = self->kernel(args.bytes, stream);
  Py_END_ALLOW_THREADS;
  if (code != 0) {
    PyErr_Format(self->error_type, "%U: %s", self->name, self->last_error());
    return NULL;
  }
  Py_RETURN_NONE;
}

static PyObject* launcher_new(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static char* names[] = {"name",        "kernel",     "last_error", "kinds", "device_type",
                          "tensor_type", "error_type", "stream_of",  "owner", NULL};
  PyObject *name, *tensor_type, *error_type, *stream_of, *owner;
  unsigned long long kernel, last_error;
  const char* kinds;
  Py_ssize_t num_fields;
  int device_type;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "UKKs#iOOOO", names, &name, &kernel, &last_error,
                                   &kinds, &num_fields, &device_type, &tensor_type, &error_type,
                                   &stream_of, &owner))
    return NULL;
  if (num_fields > kMaxFields || kernel == 0 || last_error == 0 || !PyType_Check(tensor_type)) {
    PyErr_SetString(PyExc_ValueError, "not a description of a kernel");
    return NULL;
  }
  PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  if (capsule == NULL) return NULL;
  const dl_exchange* exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (exchange == NULL || exchange->header.major != 1 || exchange->tensor_from_object == NULL) {
    if (!PyErr_Occurred())
      PyErr_SetString(PyExc_RuntimeError, "this torch has another version of DLPack's interface");
    Py_DECREF(capsule);
    return NULL;
  }
  Launcher* self = (Launcher*)type->tp_alloc(type, 0);
  if (self == NULL) {
    Py_DECREF(capsule);
    return NULL;
  }
  self->vectorcall = launch;
  self->kernel = (kernel_function)(uintptr_t)kernel;
  self->last_error = (const char* (*)(void))(uintptr_t)last_error;
  self->exchange = exchange;
  self->capsule = capsule;
  self->tensor_type = Py_NewRef(tensor_type);
  self->error_type = Py_NewRef(error_type);
  self->stream_of = Py_NewRef(stream_of);
  self->owner = Py_NewRef(owner);
  self->name = Py_NewRef(name);
  self->device_type = device_type;
  self->num_fields = num_fields;
  memcpy(self->kinds, kinds, num_fields);
  return (PyObject*)self;
}

static void launcher_dealloc(PyObject* object) {
  Launcher* self = (Launcher*)object;
  Py_XDECREF(self->capsule);
  Py_XDECREF(self->tensor_type);
  Py_XDECREF(self->error_type);
  Py_XDECREF(self->stream_of);
  Py_XDECREF(self->owner);
  Py_XDECREF(self->name);
  Py_TYPE(object)->tp_free(object);
}

static PyTypeObject launcher_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kernelhub_binding.Launcher",
    .tp_basicsize = sizeof(Launcher),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = launcher_new,
    .tp_dealloc = launcher_dealloc,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Launcher, vectorcall),
    .tp_doc = "Packs its arguments into a kernel's argument struct and calls the kernel.",
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kernelhub_binding",
    .m_doc = "The fast path from Python to compiled kernels.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit_kernelhub_binding(void) {
  if (PyType_Ready(&launcher_type) < 0) return NULL;
  PyObject* made = PyModule_Create(&module);
  if (made == NULL) return NULL;
  if (PyModule_AddStringConstant(made, "fingerprint", KH_ABI_FINGERPRINT) < 0 ||
      PyModule_AddObjectRef(made, "Launcher", (PyObject*)&launcher_type) < 0) {
    Py_DECREF(made);
    return NULL;
  }
  return made;
}
