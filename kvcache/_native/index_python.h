// Between Python and the index: buffers of integers in and out, refusals.

#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "index_walk.h"

namespace kvcache::index {

namespace py = pybind11;

constexpr std::size_t blocks_max = 1u << 30;

// Becomes BadInput.
struct Refusal {
    const char* code;
    std::string what;
};

// Integers of `Item`'s size, or bytes that are whole ones; copied only where they are not aligned.
template <typename Item>
class Items {
public:
    explicit Items(py::handle owner) {
        if (PyObject_GetBuffer(owner.ptr(), &buffer_, PyBUF_ND | PyBUF_FORMAT) != 0) {
            if (PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
            PyErr_Clear();
            throw Refusal{"bad_prefix", "the buffer is not contiguous"};
        }
        const auto bytes = static_cast<std::size_t>(buffer_.len);
        if (!fits() || bytes % sizeof(Item) != 0 || bytes / sizeof(Item) > blocks_max) {
            PyBuffer_Release(&buffer_);
            throw Refusal{"bad_prefix", "the buffer is not of " + std::to_string(8 * sizeof(Item)) +
                                            "-bit integers"};
        }
        count_ = static_cast<u32>(bytes / sizeof(Item));
        items_ = static_cast<const Item*>(buffer_.buf);
        if (count_ == 0 || reinterpret_cast<std::uintptr_t>(items_) % alignof(Item) == 0) return;
        copied_.resize(count_);
        std::memcpy(copied_.data(), buffer_.buf, bytes);
        items_ = copied_.data();
    }
    ~Items() { PyBuffer_Release(&buffer_); }
    Items(const Items&) = delete;
    Items& operator=(const Items&) = delete;

    const Item* data() const { return items_; }
    u32 count() const { return count_; }

private:
    bool fits() const {
        const char* format = buffer_.format == nullptr ? "B" : buffer_.format;
        if (*format == '<' || *format == '@' || *format == '=') ++format;
        if (std::strlen(format) != 1) return false;
        if (buffer_.itemsize == 1) return std::strchr("Bbc", *format) != nullptr;
        return buffer_.itemsize == sizeof(Item) && std::strchr("QqLlIiHh", *format) != nullptr;
    }

    Py_buffer buffer_{};
    std::vector<Item> copied_;
    const Item* items_ = nullptr;
    u32 count_ = 0;
};

// Integers that a memoryview shows without copying them.
template <typename Item>
struct Column {
    std::vector<Item> items;
};

template <typename Item>
void define_column(py::module_& module, const char* name, const char* format) {
    py::class_<Column<Item>>(module, name, py::buffer_protocol()).def_buffer([format](Column<Item>& column) {
        const auto count = static_cast<py::ssize_t>(column.items.size());
        return py::buffer_info(column.items.data(), sizeof(Item), format, 1, {count}, {sizeof(Item)}, true);
    });
}

template <typename Item>
py::memoryview view_of(std::vector<Item>&& items) {
    return py::memoryview(py::cast(Column<Item>{std::move(items)}));
}

// Sets Python's error to what was thrown. REQUIRES: in a `catch`.
inline void raise_thrown() {
    try {
        throw;
    } catch (const Refusal& refusal) {
        const py::object bad_input = py::module_::import("kvcache.errors").attr("BadInput");
        const py::object error =
            bad_input(refusal.code, refusal.what, "the index takes u64 buffers, open holders and tiers 0 to 3",
                      "nothing was changed; see kvcache.index");
        PyErr_SetObject(bad_input.ptr(), error.ptr());
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
}

}  // namespace kvcache::index
