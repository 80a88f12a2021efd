// Between Python and the index: buffers of integers in, columns of answers out, refusals.

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
constexpr u32 answer_columns = sizeof(Answer) / sizeof(u32);

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
        if (reinterpret_cast<std::uintptr_t>(items_) % alignof(Item) == 0) return;
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

class Match {
public:
    std::vector<Answer> answers;
    std::vector<u32> ends;  // Of `match_many`: where the answers of each query end.
};

// All of it: `answer_columns` u32 an answer.
inline int match_buffer(PyObject* self, Py_buffer* view, int flags) {
    static Py_ssize_t strides[] = {sizeof(u32)};
    if ((flags & PyBUF_WRITABLE) != 0) {
        PyErr_SetString(PyExc_BufferError, "answers are read-only");
        return -1;
    }
    auto& answers = py::handle(self).cast<Match&>().answers;
    *view = Py_buffer{};
    view->buf = answers.data();
    view->len = static_cast<Py_ssize_t>(answers.size() * sizeof(Answer));
    view->itemsize = sizeof(u32);
    view->readonly = 1;
    view->ndim = 1;
    view->format = (flags & PyBUF_FORMAT) != 0 ? const_cast<char*>("I") : nullptr;
    if ((flags & PyBUF_ND) != 0) {
        view->shape = reinterpret_cast<Py_ssize_t*>(&view->internal);
        view->internal = reinterpret_cast<void*>(view->len / static_cast<Py_ssize_t>(sizeof(u32)));
    }
    if ((flags & PyBUF_STRIDES) == PyBUF_STRIDES) view->strides = strides;
    view->obj = self;
    Py_INCREF(self);
    return 0;
}

inline py::object view_of_match(py::handle self) {
    auto whole = py::reinterpret_steal<py::object>(PyMemoryView_FromObject(self.ptr()));
    if (!whole) throw py::error_already_set();
    return whole;
}

inline py::object column(py::handle self, u32 number) {
    const py::object whole = view_of_match(self);
    const py::slice every(static_cast<py::ssize_t>(number), std::nullopt, static_cast<py::ssize_t>(answer_columns));
    return whole[every];
}

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

inline py::dict as_dict(const Match& match) {
    py::dict made;
    for (const Answer& answer : match.answers)
        made[py::make_tuple(answer.worker, answer.rank)] = answer.blocks;
    return made;
}

}  // namespace kvcache::index
