// The Python module lookm_kernels._C: pointers and the stream arrive as integers, errors leave as RuntimeError.
#include <sstream>
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "lookm.h"

namespace py = pybind11;
using namespace lookm;
using std::int64_t;
using Address = std::uintptr_t;

namespace {

template <typename T>
T *pointer(Address address) {
    return reinterpret_cast<T *>(address);
}

Rows rows(Address data, const std::tuple<int64_t, int64_t, int64_t> &strides, int64_t width) {
    return {pointer<void>(data), std::get<0>(strides), std::get<1>(strides), std::get<2>(strides), width};
}

// RuntimeError with the kernel, the shapes and CUDA's message.
void check(cudaError_t error, const char *kernel, const std::string &shapes) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(kernel) + " (" + shapes + "): " + cudaGetErrorString(error) + " [" +
                             cudaGetErrorName(error) + "]");
}

template <typename Arguments>
std::string shapes(const Arguments &a) {
    std::ostringstream text;
    text << "B=" << a.batch << " H=" << a.heads << " N=" << a.tokens << " K=" << a.kept_size;
    return text.str();
}

template <typename Arguments>
std::string widths(const Arguments &a) {
    std::ostringstream text;
    text << shapes(a) << " D=" << a.key.width << " Dv=" << a.value.width << " of " << item_bytes(a.dtype) << " bytes";
    return text.str();
}

Dtype dtype_of(int tag) {
    if (tag < 0 || tag > 2) throw std::invalid_argument("`dtype` must be 0, 1 or 2, got " + std::to_string(tag));
    return static_cast<Dtype>(tag);
}

using Strides = std::tuple<int64_t, int64_t, int64_t>;

void run_compact(Address key, const Strides &key_strides, int64_t key_width, Address value,
                 const Strides &value_strides, int64_t value_width, Address kept, int dtype, int batch, int heads,
                 int tokens, int kept_size, Address stream) {
    const Compact a{rows(key, key_strides, key_width),
                    rows(value, value_strides, value_width),
                    pointer<const int>(kept),
                    dtype_of(dtype),
                    batch,
                    heads,
                    tokens,
                    kept_size};
    check(compact(a, pointer<CUstream_st>(stream)), "compact", widths(a));
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CUDA C++ kernels of lookm_kernels; the launchers in lookm_kernels/cuda/ call them.";
#ifdef LOOKM_EMULATED
    module.attr("device_type") = "cpu";
#else
    module.attr("device_type") = "cuda";
#endif
    module.attr("cuda_version") = CUDART_VERSION;
    using release = py::call_guard<py::gil_scoped_release>;

    module.def("compact", &run_compact, release(), py::arg("key"), py::arg("key_strides"), py::arg("key_width"),
               py::arg("value"), py::arg("value_strides"), py::arg("value_width"), py::arg("kept"), py::arg("dtype"),
               py::arg("batch"), py::arg("heads"), py::arg("tokens"), py::arg("kept_size"), py::arg("stream"));
    module.def("compact_slab_bytes", &compact_slab_bytes, py::arg("rows"), py::arg("key_bytes"),
               py::arg("value_bytes"), py::arg("multiprocessors"));
    module.def(
        "access_bytes",
        [](Address data, const Strides &strides, int64_t width, int batch, int heads, int tokens, int item) {
            return access_bytes(rows(data, strides, width), batch, heads, tokens, item);
        },
        py::arg("data"), py::arg("strides"), py::arg("width"), py::arg("batch"), py::arg("heads"), py::arg("tokens"),
        py::arg("item"));
}
