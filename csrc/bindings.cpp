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

// Address, strides, width, tag of the dtype.
using Operand = std::tuple<Address, std::tuple<int64_t, int64_t, int64_t>, int, int>;

Rows rows(const Operand &operand) {
    const auto &[stride_b, stride_h, stride_n] = std::get<1>(operand);
    return {pointer<void>(std::get<0>(operand)), stride_b, stride_h, stride_n, std::get<2>(operand)};
}

Dtype dtype_of(const Operand &operand) {
    const int tag = std::get<3>(operand);
    if (tag < 0 || tag > 2) throw std::invalid_argument("`dtype` must be 0, 1 or 2, got " + std::to_string(tag));
    return static_cast<Dtype>(tag);
}

// RuntimeError with the kernel, the shapes and CUDA's message.
void check(cudaError_t error, const char *kernel, const std::string &shapes) {
    if (error == cudaSuccess) return;
    // or CUB would find it after its next launch
    cudaGetLastError();
    throw std::runtime_error(std::string(kernel) + " (" + shapes + "): " + cudaGetErrorString(error) + " [" +
                             cudaGetErrorName(error) + "]");
}

std::string shapes(const Select &a) {
    std::ostringstream text;
    text << "B=" << a.batch << " H=" << a.heads << " N=" << a.tokens << " K=" << a.kept_size << " E=" << a.evicted_size;
    return text.str();
}

template <typename Arguments>
std::string widths(const Arguments &a) {
    std::ostringstream text;
    text << "B=" << a.batch << " H=" << a.heads << " N=" << a.tokens << " K=" << a.kept_size << " D=" << a.key.width
         << " of " << item_bytes(a.key_dtype) << " bytes Dv=" << a.value.width << " of " << item_bytes(a.value_dtype)
         << " bytes";
    return text.str();
}

std::string shapes(const Merge &a) { return widths(a) + " E=" + std::to_string(a.evicted_size); }

std::string shapes(const Compact &a) { return widths(a); }

void run_select(Address scores, Address tier, Address keeps, Address kept, Address evicted, int batch, int heads,
                int tokens, int keep, int kept_size, int evicted_size, Address stream) {
    const Select a{pointer<const float>(scores),
                   pointer<const int>(tier),
                   pointer<const int>(keeps),
                   pointer<int>(kept),
                   pointer<int>(evicted),
                   batch,
                   heads,
                   tokens,
                   keep,
                   kept_size,
                   evicted_size};
    check(select_tokens(a, pointer<CUstream_st>(stream)), "select", shapes(a));
}

std::size_t bytes_for_merge(int batch, int heads, int kept_size, int evicted_size, int key_width, int value_width) {
    std::size_t bytes = 0;
    const cudaError_t error =
        merge_workspace(merge_plan(batch, heads, kept_size, evicted_size, key_width, value_width), &bytes);
    std::ostringstream text;
    text << "B=" << batch << " H=" << heads << " K=" << kept_size << " E=" << evicted_size;
    check(error, "merge's workspace", text.str());
    return bytes;
}

void run_merge(const Operand &key, const Operand &value, const Operand &out_key, const Operand &out_value, Address kept,
               Address evicted, Address pivot, Address evicted_weight, Address kept_weight, Address votes,
               Address out_votes, int batch, int heads, int tokens, int kept_size, int evicted_size, Address workspace,
               std::size_t workspace_bytes, Address stream) {
    const Merge a{rows(key),
                  rows(value),
                  rows(out_key),
                  rows(out_value),
                  pointer<const int>(kept),
                  pointer<const int>(evicted),
                  pointer<const int>(pivot),
                  pointer<const float>(evicted_weight),
                  pointer<const float>(kept_weight),
                  pointer<const float>(votes),
                  pointer<float>(out_votes),
                  dtype_of(key),
                  dtype_of(value),
                  batch,
                  heads,
                  tokens,
                  kept_size,
                  evicted_size};
    check(merge(a, pointer<void>(workspace), workspace_bytes, pointer<CUstream_st>(stream)), "merge", shapes(a));
}

void run_compact(const Operand &key, const Operand &value, const Operand &out_key, const Operand &out_value,
                 Address kept, int batch, int heads, int tokens, int kept_size, Address stream) {
    const Compact a{rows(key),     rows(value),     rows(out_key), rows(out_value), pointer<const int>(kept),
                    dtype_of(key), dtype_of(value), batch,         heads,           tokens,
                    kept_size};
    check(compact(a, pointer<CUstream_st>(stream)), "compact", shapes(a));
}

py::dict plan_of(int batch, int heads, int kept_size, int evicted_size, int key_width, int value_width) {
    const MergePlan plan = merge_plan(batch, heads, kept_size, evicted_size, key_width, value_width);
    py::dict found;
    found["items"] = plan.items;
    found["key_bits"] = plan.key_bits;
    found["tiles"] = plan.tiles;
    found["offsets"] =
        py::make_tuple(plan.keys[0], plan.keys[1], plan.places[0], plan.places[1], plan.starts, plan.sums, plan.sort);
    return found;
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

    module.def("select", &run_select, release(), "Addresses of device memory, sizes, the stream; see lookm.h.",
               py::arg("scores"), py::arg("tier"), py::arg("keeps"), py::arg("kept"), py::arg("evicted"),
               py::arg("batch"), py::arg("heads"), py::arg("tokens"), py::arg("keep"), py::arg("kept_size"),
               py::arg("evicted_size"), py::arg("stream"));
    module.def("merge_workspace", &bytes_for_merge, release(), "Bytes of workspace that merge needs on this device.",
               py::arg("batch"), py::arg("heads"), py::arg("kept_size"), py::arg("evicted_size"), py::arg("key_width"),
               py::arg("value_width"));
    module.def("merge", &run_merge, release(), "Addresses of device memory, sizes, the stream; see lookm.h.",
               py::arg("key"), py::arg("value"), py::arg("out_key"), py::arg("out_value"), py::arg("kept"),
               py::arg("evicted"), py::arg("pivot"), py::arg("evicted_weight"), py::arg("kept_weight"),
               py::arg("votes"), py::arg("out_votes"), py::arg("batch"), py::arg("heads"), py::arg("tokens"),
               py::arg("kept_size"), py::arg("evicted_size"), py::arg("workspace"), py::arg("workspace_bytes"),
               py::arg("stream"));
    module.def("compact", &run_compact, release(), "Addresses of device memory, sizes, the stream; see lookm.h.",
               py::arg("key"), py::arg("value"), py::arg("out_key"), py::arg("out_value"), py::arg("kept"),
               py::arg("batch"), py::arg("heads"), py::arg("tokens"), py::arg("kept_size"), py::arg("stream"));

    module.def(
        "can_run", [] { check(can_run(), "kernels", "on the current device"); }, release(),
        "RuntimeError where the driver does not take these kernels, or none is for the current device.");

    // what the launchers decide on the host, for the tests
    module.def("select_cache_bytes", &select_cache_bytes, py::arg("tokens"), py::arg("limit"));
    module.def("merge_plan", &plan_of, py::arg("batch"), py::arg("heads"), py::arg("kept_size"),
               py::arg("evicted_size"), py::arg("key_width"), py::arg("value_width"));
    module.def("compact_slab_bytes", &compact_slab_bytes, py::arg("rows"), py::arg("key_bytes"), py::arg("value_bytes"),
               py::arg("multiprocessors"));
    module.def(
        "access_bytes",
        [](const Operand &x, int batch, int heads, int tokens) {
            return access_bytes(rows(x), batch, heads, tokens, item_bytes(dtype_of(x)));
        },
        py::arg("x"), py::arg("batch"), py::arg("heads"), py::arg("tokens"));
}
