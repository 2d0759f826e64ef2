//! Storage of tasks: it goes away with its thread.

use aya_ebpf::helpers::generated;

/// `BPF_F_NO_PREALLOC`: memory for what is there, not for what could be.
const NO_PREALLOC: usize = 1;

/// `BPF_MAP_TYPE_TASK_STORAGE`, which aya has no type for.
#[repr(C)]
pub struct TaskStorage<T> {
    r#type: *const [i32; 29],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; NO_PREALLOC],
}
// SAFETY: the pointers carry types for the loader and are never followed.
unsafe impl<T> Sync for TaskStorage<T> {}

impl<T> TaskStorage<T> {
    pub const fn new() -> Self {
        Self {
            r#type: core::ptr::null(),
            key: core::ptr::null(),
            value: core::ptr::null(),
            max_entries: core::ptr::null(),
            map_flags: core::ptr::null(),
        }
    }

    /// That of the current thread.
    #[inline(always)]
    pub fn get(&'static self, create: bool) -> Option<*mut T> {
        // SAFETY: helpers without preconditions; the task is the current one.
        let found = unsafe {
            generated::bpf_task_storage_get(
                core::ptr::from_ref(self).cast_mut().cast(),
                generated::bpf_get_current_task_btf() as *mut _,
                core::ptr::null_mut(),
                u64::from(create),
            )
        };
        if found.is_null() { None } else { Some(found.cast()) }
    }
}
