// SPDX-License-Identifier: Apache-2.0
// The fast path from Python to a compiled kernel: a callable that packs its arguments into the
// kernel's argument struct and calls it, and one that says whether a call is like one that has been
// checked. They read tensors through DLPack's C exchange interface, which torch offers from 2.10
// on, so they need no torch header and serve every device type.
//
// kernelhub/backends/native/library.py has the first in ctypes, for where this cannot be built.
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

// The exchange interface of a tensor type; `capsule` keeps it alive. NULL with an error set.
static const dl_exchange* exchange_of(PyObject* tensor_type, PyObject** capsule) {
  *capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  if (*capsule == NULL) return NULL;
  const dl_exchange* exchange = PyCapsule_GetPointer(*capsule, "dlpack_exchange_api");
  if (exchange == NULL || exchange->header.major != 1 || exchange->tensor_from_object == NULL) {
    if (!PyErr_Occurred())
      PyErr_SetString(PyExc_RuntimeError, "this torch has another version of DLPack's interface");
    Py_CLEAR(*capsule);
    return NULL;
  }
  return exchange;
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
  PyObject* capsule;
  const dl_exchange* exchange = exchange_of(tensor_type, &capsule);
  if (exchange == NULL) return NULL;
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

// ---- what a call is like ---------------------------------------------------------------------

// From the arguments of a call to bytes that are equal for calls that the checks of an op cannot
// tell apart: types, dtypes, devices, sizes, strides and numbers, how tensors that are written to
// lie in memory beside those that they overlap, and whether a gradient may be asked for. None for
// whatever is unusual, and while anything follows or transforms torch's ops. Without `checks`, for
// calls that nobody checks, no more than what a kernel is told of them: types to numbers.
enum { kMostKeyBytes = 2048, kMostDims = 16, kMostText = 64 };

typedef struct {
  PyObject_HEAD vectorcallfunc vectorcall;
  const dl_exchange* exchange;
  PyObject* capsule;
  PyObject *tensor_type, *parameter_type, *dtype_type;
  PyObject *requires_grad, *version, *is_neg;  // of the tensor type: two properties, a method
  PyObject *grad_enabled, *inference_mode;     // whether these are on
  PyObject* watchers;            // a tuple: where one returns something true, there is no key
  PyObject *forward_ad, *level;  // module and name of its level, -1 where there is none
  int checks;
  Py_ssize_t num_fields;
  char roles[kMaxFields];  // 'w' is written to; of 'n' a number's type is told, not the number
} Key;

typedef struct {
  size_t size;
  char bytes[kMostKeyBytes];
} Text;

// What is found out of a call on the way.
typedef struct {
  int wants_grad;      // whether a tensor requires grad
  int inference_mode;  // whether it is on, -1 before it is asked
} Found;

// The size goes past the end where there is no more room.
static void put(Text* to, const void* from, size_t size) {
  if (to->size + size <= kMostKeyBytes) memcpy(to->bytes + to->size, from, size);
  to->size += size;
}
static void put_char(Text* to, char letter) { put(to, &letter, 1); }
static void put_number(Text* to, int64_t number) { put(to, &number, sizeof(number)); }

// The bytes that a tensor reaches: from `begin` to before the result.
static uintptr_t end_of(const dl_tensor* t, uintptr_t* begin) {
  *begin = (uintptr_t)t->data + t->byte_offset;
  int64_t last = 0;
  for (int i = 0; i < t->ndim; ++i) {
    if (t->shape[i] == 0) return *begin;
    last += (t->shape[i] - 1) * t->strides[i];
  }
  return *begin + (last + 1) * ((t->dtype.bits * t->dtype.lanes + 7) / 8);
}

// Takes a reference: 1 for True, 0 for False, -1 for anything else, an error among it.
static int as_bool(PyObject* found) {
  const int result = found == Py_True ? 1 : found == Py_False ? 0 : -1;
  Py_XDECREF(found);
  return result;
}

static PyObject* property_of(PyObject* tensor, PyObject* property) {
  return Py_TYPE(property)->tp_descr_get(property, tensor, (PyObject*)Py_TYPE(tensor));
}

// 1 where nothing follows or transforms torch's ops, in this thread or, of forward mode, in any.
static int is_quiet(const Key* self) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(self->watchers); ++i) {
    PyObject* found = PyObject_CallNoArgs(PyTuple_GET_ITEM(self->watchers, i));
    const int busy = found == NULL ? -1 : PyObject_IsTrue(found);
    Py_XDECREF(found);
    if (busy != 0) return 0;
  }
  PyObject* level = PyObject_GetAttr(self->forward_ad, self->level);
  const int none = level != NULL && PyLong_Check(level) && PyLong_AsLong(level) == -1;
  Py_XDECREF(level);
  return none;
}

// 1, or 0 where torch forbids to write to a tensor: outside of inference mode to those made in it,
// which alone have no version.
static int is_writable(const Key* self, PyObject* value, Found* found) {
  if (found->inference_mode < 0) {
    found->inference_mode = as_bool(PyObject_CallNoArgs(self->inference_mode));
    if (found->inference_mode < 0) return 0;
  }
  if (found->inference_mode) return 1;
  PyObject* version = property_of(value, self->version);
  Py_XDECREF(version);
  return version != NULL;
}

// 1, or 0 where the checks would have more to say of a tensor than a key tells.
static int is_plain(const Key* self, PyObject* value, char role, Found* found) {
  const int with_grad = as_bool(property_of(value, self->requires_grad));
  if (with_grad < 0 || (role == 'w' && (with_grad || !is_writable(self, value, found)))) return 0;
  found->wants_grad |= with_grad;
  return as_bool(PyObject_CallOneArg(self->is_neg, value)) == 0;
}

// 1, or 0 where the tensor is not plain memory.
static int put_tensor(const Key* self, PyObject* value, char role, Text* to, dl_tensor* t,
                      Found* found) {
  if ((self->checks && !is_plain(self, value, role, found)) ||
      self->exchange->tensor_from_object(value, t) != 0 || t->ndim > kMostDims)
    return 0;
  put_char(to, 'T');
  put(to, &t->dtype, sizeof(t->dtype));
  put(to, &t->device, sizeof(t->device));
  put_number(to, t->ndim);
  if (t->ndim > 0) {
    put(to, t->shape, t->ndim * sizeof(int64_t));
    put(to, t->strides, t->ndim * sizeof(int64_t));
  }
  return 1;
}

// 1, or 0 where the value is nothing known.
static int put_plain(const Key* self, PyObject* value, char role, Text* to) {
  if (value == Py_None) {
    put_char(to, 'N');
  } else if (PyBool_Check(value)) {
    put_char(to, value == Py_True ? '1' : '0');
  } else if (PyLong_CheckExact(value)) {
    int overflow = 0;
    const int64_t number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow != 0) return 0;
    put_char(to, 'i');
    if (role != 'n') put_number(to, number);
  } else if (PyFloat_CheckExact(value)) {
    const double number = PyFloat_AS_DOUBLE(value);
    put_char(to, 'f');
    if (role != 'n') put(to, &number, sizeof(number));
  } else if (PyUnicode_CheckExact(value)) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(value, &size);
    if (text == NULL || size > kMostText) return 0;
    put_char(to, 's');
    put_number(to, size);
    put(to, text, size);
  } else if ((PyObject*)Py_TYPE(value) == self->dtype_type) {
    const uintptr_t which = (uintptr_t)value;  // dtypes live as long as torch
    put_char(to, 'd');
    put(to, &which, sizeof(which));
  } else {
    return 0;
  }
  return 1;
}

static PyObject* key_of(PyObject* callable, PyObject* const* values, size_t flags,
                        PyObject* names) {
  const Key* self = (const Key*)callable;
  const Py_ssize_t count = PyVectorcall_NARGS(flags);
  if (names != NULL || count != self->num_fields) {
    PyErr_Format(PyExc_TypeError, "expected %zd positional arguments, got %zd", self->num_fields,
                 count);
    return NULL;
  }
  if (self->checks && !is_quiet(self)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  Text text;
  text.size = 0;
  Found found = {0, -1};
  dl_tensor tensors[kMaxFields];
  uintptr_t begin[kMaxFields], end[kMaxFields];
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* type = (PyObject*)Py_TYPE(values[i]);
    const int is_tensor = type == self->tensor_type || type == self->parameter_type;
    begin[i] = end[i] = 0;
    if (!(is_tensor ? put_tensor(self, values[i], self->roles[i], &text, &tensors[i], &found)
                    : put_plain(self, values[i], self->roles[i], &text))) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    if (is_tensor) end[i] = end_of(&tensors[i], &begin[i]);
  }
  if (found.wants_grad) {
    const int enabled = as_bool(PyObject_CallNoArgs(self->grad_enabled));
    if (enabled < 0) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    if (enabled) put_char(&text, 'G');
  }
  for (Py_ssize_t i = 0; self->checks && i < count; ++i) {
    if (self->roles[i] != 'w' || begin[i] == end[i]) continue;
    for (Py_ssize_t j = 0; j < count; ++j) {
      if (j == i || begin[j] == end[j] || begin[i] >= end[j] || begin[j] >= end[i]) continue;
      put_char(&text, 'O');
      put_number(&text, i * kMaxFields + j);
      put_number(&text, (int64_t)(begin[j] - begin[i]));
    }
  }
  if (text.size > kMostKeyBytes) Py_RETURN_NONE;
  return PyBytes_FromStringAndSize(text.bytes, text.size);
}

static void key_dealloc(PyObject* object) {
  Key* self = (Key*)object;
  Py_XDECREF(self->capsule);
  Py_XDECREF(self->tensor_type);
  Py_XDECREF(self->parameter_type);
  Py_XDECREF(self->dtype_type);
  Py_XDECREF(self->requires_grad);
  Py_XDECREF(self->version);
  Py_XDECREF(self->is_neg);
  Py_XDECREF(self->grad_enabled);
  Py_XDECREF(self->inference_mode);
  Py_XDECREF(self->watchers);
  Py_XDECREF(self->forward_ad);
  Py_XDECREF(self->level);
  Py_TYPE(object)->tp_free(object);
}

static PyObject* key_new(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  static char* names[] = {
      "roles",          "tensor_type", "parameter_type", "dtype_type", "grad_enabled",
      "inference_mode", "watchers",    "forward_ad",     "checks",     NULL};
  PyObject *tensor_type, *parameter_type, *dtype_type, *grad_enabled, *inference_mode, *watchers;
  PyObject* forward_ad;
  const char* roles;
  Py_ssize_t num_fields;
  int checks;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "s#OOOOOO!Op", names, &roles, &num_fields,
                                   &tensor_type, &parameter_type, &dtype_type, &grad_enabled,
                                   &inference_mode, &PyTuple_Type, &watchers, &forward_ad, &checks))
    return NULL;
  if (num_fields > kMaxFields) {
    PyErr_SetString(PyExc_ValueError, "too many arguments");
    return NULL;
  }
  PyObject* capsule;
  const dl_exchange* exchange = exchange_of(tensor_type, &capsule);
  if (exchange == NULL) return NULL;
  Key* self = (Key*)type->tp_alloc(type, 0);
  if (self == NULL) {
    Py_DECREF(capsule);
    return NULL;
  }
  self->vectorcall = key_of;
  self->exchange = exchange;
  self->capsule = capsule;
  self->tensor_type = Py_NewRef(tensor_type);
  self->parameter_type = Py_NewRef(parameter_type);
  self->dtype_type = Py_NewRef(dtype_type);
  self->requires_grad = PyObject_GetAttrString(tensor_type, "requires_grad");
  self->version = PyObject_GetAttrString(tensor_type, "_version");
  self->is_neg = PyObject_GetAttrString(tensor_type, "is_neg");
  self->grad_enabled = Py_NewRef(grad_enabled);
  self->inference_mode = Py_NewRef(inference_mode);
  self->watchers = Py_NewRef(watchers);
  self->forward_ad = Py_NewRef(forward_ad);
  self->level = PyUnicode_InternFromString("_current_level");
  self->checks = checks;
  self->num_fields = num_fields;
  memcpy(self->roles, roles, num_fields);
  if (self->requires_grad == NULL || self->version == NULL || self->is_neg == NULL ||
      self->level == NULL) {
    Py_DECREF(self);
    return NULL;
  }
  if (Py_TYPE(self->requires_grad)->tp_descr_get == NULL ||
      Py_TYPE(self->version)->tp_descr_get == NULL) {
    PyErr_SetString(PyExc_RuntimeError, "requires_grad or _version of this torch is no property");
    Py_DECREF(self);
    return NULL;
  }
  return (PyObject*)self;
}

static PyTypeObject key_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "kernelhub_binding.Key",
    .tp_basicsize = sizeof(Key),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = key_new,
    .tp_dealloc = key_dealloc,
    .tp_call = PyVectorcall_Call,
    .tp_vectorcall_offset = offsetof(Key, vectorcall),
    .tp_doc = "What a call is like, as bytes.",
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "kernelhub_binding",
    .m_doc = "The fast path from Python to compiled kernels.",
    .m_size = -1,
};

PyMODINIT_FUNC PyInit_kernelhub_binding(void) {
  if (PyType_Ready(&launcher_type) < 0 || PyType_Ready(&key_type) < 0) return NULL;
  PyObject* made = PyModule_Create(&module);
  if (made == NULL) return NULL;
  if (PyModule_AddStringConstant(made, "fingerprint", KH_ABI_FINGERPRINT) < 0 ||
      PyModule_AddObjectRef(made, "Launcher", (PyObject*)&launcher_type) < 0 ||
      PyModule_AddObjectRef(made, "Key", (PyObject*)&key_type) < 0) {
    Py_DECREF(made);
    return NULL;
  }
  return made;
}
