//! A buffer that several threads write at disjoint ranges.

use std::marker::PhantomData;

/// A mutable buffer shared by tasks that each write ranges of their own.
pub(super) struct SharedMut<'a> {
    start: *mut f32,
    len: usize,
    buffer: PhantomData<&'a mut [f32]>,
}

#[expect(
    unsafe_code,
    reason = "tasks on several threads write disjoint parts of one buffer"
)]
// SAFETY: the pointer is only dereferenced in `write`, whose callers keep the ranges disjoint.
unsafe impl Sync for SharedMut<'_> {}

impl<'a> SharedMut<'a> {
    pub(super) fn new(buffer: &'a mut [f32]) -> Self {
        Self {
            start: buffer.as_mut_ptr(),
            len: buffer.len(),
            buffer: PhantomData,
        }
    }

    /// Copies `values` into the buffer from index `first` on.
    ///
    /// # Safety
    /// The ranges of concurrent calls must not overlap.
    #[expect(
        unsafe_code,
        reason = "tasks on several threads write disjoint parts of one buffer"
    )]
    pub(super) unsafe fn write(&self, first: usize, values: &[f32]) {
        assert!(
            first <= self.len && values.len() <= self.len - first,
            "a task writes outside its buffer"
        );
        // SAFETY: in bounds by the assertion; no other thread writes there by the contract.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(first), values.len());
        }
    }
}
