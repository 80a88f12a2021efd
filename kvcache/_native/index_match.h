// The answer as Python sees it: columns of u32 behind one another in one object, shown by memoryviews.
//
// Types of their own and not pybind11's, because a match is asked for a million times a second: an answer
// is one allocation, a column one memoryview more.

#pragma once

#include "index_python.h"

namespace kvcache::index {

// `ob_size` values; a buffer of `shape` of them from `from` on is what the next memoryview shows.
struct Values {
    PyVarObject head;
    PyObject* ends;  // Of `match_many`, else null: where the answers of each query end.
    Py_ssize_t answers;
    Py_ssize_t shape;
    u32 from;
    u32 items[1];
};

class MatchTypes {
public:
    static PyTypeObject* match;
    static PyTypeObject* table;

    static void make(py::module_& module);
};

inline PyTypeObject* MatchTypes::match = nullptr;
inline PyTypeObject* MatchTypes::table = nullptr;

inline Values* new_values(PyTypeObject* type, std::size_t count) {
    auto* made = reinterpret_cast<Values*>(PyObject_Malloc(offsetof(Values, items) + (count + 1) * sizeof(u32)));
    if (made == nullptr) throw std::bad_alloc();
    PyObject_InitVar(&made->head, type, static_cast<Py_ssize_t>(count));
    made->ends = nullptr;
    made->answers = 0;
    made->shape = static_cast<Py_ssize_t>(count);
    made->from = 0;
    return made;
}

inline Values* new_match(u32 answers) {
    Values* made = new_values(MatchTypes::match, std::size_t{answers} * column_count);
    made->answers = made->shape = answers;
    return made;
}

inline Columns columns_of(Values* match) {
    Columns columns;
    for (u32 i = 0; i < column_count; ++i) columns[i] = match->items + match->answers * i;
    return columns;
}

inline void free_values(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    Py_XDECREF(reinterpret_cast<Values*>(self)->ends);
    PyObject_Free(self);
    Py_DECREF(type);
}

inline int buffer_of_values(PyObject* self, Py_buffer* view, int flags) {
    static Py_ssize_t strides[] = {sizeof(u32)};
    if ((flags & PyBUF_WRITABLE) != 0) {
        PyErr_SetString(PyExc_BufferError, "answers are read-only");
        return -1;
    }
    auto* values = reinterpret_cast<Values*>(self);
    *view = Py_buffer{};
    view->buf = values->items + values->from;
    view->len = values->shape * static_cast<Py_ssize_t>(sizeof(u32));
    view->itemsize = sizeof(u32);
    view->readonly = 1;
    view->ndim = 1;
    view->format = (flags & PyBUF_FORMAT) != 0 ? const_cast<char*>("I") : nullptr;
    if ((flags & PyBUF_ND) != 0) view->shape = &values->shape;
    if ((flags & PyBUF_STRIDES) == PyBUF_STRIDES) view->strides = strides;
    view->obj = Py_NewRef(self);
    return 0;
}

inline PyObject* column_of(PyObject* self, std::size_t number) {
    auto* match = reinterpret_cast<Values*>(self);
    for (;;) {  // Making a memoryview may collect garbage first, and what that runs may ask for another column.
        match->from = static_cast<u32>(number * static_cast<std::size_t>(match->answers));
        PyObject* view = PyMemoryView_FromObject(self);
        if (view == nullptr || PyMemoryView_GET_BUFFER(view)->buf == columns_of(match)[number]) return view;
        Py_DECREF(view);
    }
}

inline PyObject* get_column(PyObject* self, void* number) {
    return column_of(self, reinterpret_cast<std::size_t>(number));
}

inline PyObject* get_tier(PyObject* self, PyObject* number) {
    const long tier = PyLong_AsLong(number);
    if (tier == -1 && PyErr_Occurred() != nullptr) return nullptr;
    if (tier >= 0 && tier < static_cast<long>(tier_count)) return column_of(self, 3 + static_cast<std::size_t>(tier));
    try {
        throw Refusal{"bad_holder", "there is no tier " + std::to_string(tier)};
    } catch (...) {
        raise_thrown();
        return nullptr;
    }
}

// All of it, answer by answer.
inline PyObject* get_table(PyObject* self, void*) {
    auto* match = reinterpret_cast<Values*>(self);
    try {
        Values* table = new_values(MatchTypes::table, static_cast<std::size_t>(match->head.ob_size));
        const Columns columns = columns_of(match);
        u32* at = table->items;
        for (Py_ssize_t i = 0; i < match->answers; ++i)
            for (const u32* column : columns) *at++ = column[i];
        PyObject* view = PyMemoryView_FromObject(reinterpret_cast<PyObject*>(table));
        Py_DECREF(table);
        return view;
    } catch (...) {
        raise_thrown();
        return nullptr;
    }
}

inline PyObject* get_ends(PyObject* self, void*) {
    PyObject* ends = reinterpret_cast<Values*>(self)->ends;
    if (ends != nullptr) return Py_NewRef(ends);
    try {
        return view_of(std::vector<u32>()).release().ptr();
    } catch (...) {
        raise_thrown();
        return nullptr;
    }
}

inline Py_ssize_t length_of_match(PyObject* self) { return reinterpret_cast<Values*>(self)->answers; }

inline PyObject* dict_of_match(PyObject* self, PyObject*) {
    try {
        const Columns columns = columns_of(reinterpret_cast<Values*>(self));
        py::dict made;
        for (Py_ssize_t i = 0; i < length_of_match(self); ++i)
            made[py::make_tuple(columns[0][i], columns[1][i])] = columns[2][i];
        return made.release().ptr();
    } catch (...) {
        raise_thrown();
        return nullptr;
    }
}

inline PyTypeObject* made_type(PyType_Spec& spec) {
    PyObject* type = PyType_FromSpec(&spec);
    if (type == nullptr) throw py::error_already_set();
    return reinterpret_cast<PyTypeObject*>(type);
}

inline void MatchTypes::make(py::module_& module) {
    static PyGetSetDef columns[] = {
        {"workers", get_column, nullptr, nullptr, reinterpret_cast<void*>(0)},
        {"dp_ranks", get_column, nullptr, nullptr, reinterpret_cast<void*>(1)},
        {"blocks", get_column, nullptr, nullptr, reinterpret_cast<void*>(2)},
        {"table", get_table, nullptr, nullptr, nullptr},
        {"ends", get_ends, nullptr, nullptr, nullptr},
        {nullptr, nullptr, nullptr, nullptr, nullptr},
    };
    static PyMethodDef methods[] = {
        {"tier", get_tier, METH_O, nullptr},
        {"as_dict", dict_of_match, METH_NOARGS, nullptr},
        {nullptr, nullptr, 0, nullptr},
    };
    static PyType_Slot match_slots[] = {
        {Py_tp_dealloc, reinterpret_cast<void*>(free_values)},
        {Py_tp_getset, columns},
        {Py_tp_methods, methods},
        {Py_sq_length, reinterpret_cast<void*>(length_of_match)},
        {Py_bf_getbuffer, reinterpret_cast<void*>(buffer_of_values)},
        {0, nullptr},
    };
    static PyType_Slot table_slots[] = {
        {Py_tp_dealloc, reinterpret_cast<void*>(free_values)},
        {Py_bf_getbuffer, reinterpret_cast<void*>(buffer_of_values)},
        {0, nullptr},
    };
    constexpr unsigned flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;
    static PyType_Spec match_spec = {"kvcache._native.index.Match", offsetof(Values, items), sizeof(u32), flags,
                                     match_slots};
    static PyType_Spec table_spec = {"kvcache._native.index.Table", offsetof(Values, items), sizeof(u32), flags,
                                     table_slots};
    match = made_type(match_spec);
    table = made_type(table_spec);
    module.add_object("Match", reinterpret_cast<PyObject*>(match));
}

}  // namespace kvcache::index
