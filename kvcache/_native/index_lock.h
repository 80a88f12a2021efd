// Many read or one writes: a read-write lock in which a waiting writer goes first.

#pragma once

#include <pthread.h>

namespace kvcache::index {

class Lock {
public:
    Lock() {
        pthread_rwlockattr_t attributes;
        pthread_rwlockattr_init(&attributes);
#if defined(__GLIBC__)
        pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
#endif
        pthread_rwlock_init(&lock_, &attributes);
        pthread_rwlockattr_destroy(&attributes);
    }
    ~Lock() { pthread_rwlock_destroy(&lock_); }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

    void read() { pthread_rwlock_rdlock(&lock_); }
    void write() { pthread_rwlock_wrlock(&lock_); }
    void unlock() { pthread_rwlock_unlock(&lock_); }

private:
    pthread_rwlock_t lock_;
};

class Reading {
public:
    explicit Reading(Lock& lock) : lock_(lock) { lock_.read(); }
    ~Reading() { lock_.unlock(); }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;

private:
    Lock& lock_;
};

class Writing {
public:
    explicit Writing(Lock& lock) : lock_(lock) { lock_.write(); }
    ~Writing() { lock_.unlock(); }
    Writing(const Writing&) = delete;
    Writing& operator=(const Writing&) = delete;

private:
    Lock& lock_;
};

}  // namespace kvcache::index
