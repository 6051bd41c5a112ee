//! Writing disjoint parts of one buffer from several threads.

use std::marker::PhantomData;

/// A buffer whose parts are handed to tasks that each write their own.
pub(super) struct SharedMut<'a> {
    start: *mut f32,
    len: usize,
    buffer: PhantomData<&'a mut [f32]>,
}

#[expect(
    unsafe_code,
    reason = "tasks on several threads write disjoint parts of one buffer"
)]
// SAFETY: the pointer is only dereferenced through `part`, whose caller keeps the parts disjoint.
unsafe impl Sync for SharedMut<'_> {}

impl<'a> SharedMut<'a> {
    pub(super) fn new(buffer: &'a mut [f32]) -> Self {
        Self {
            start: buffer.as_mut_ptr(),
            len: buffer.len(),
            buffer: PhantomData,
        }
    }

    /// Overwrites the values from `first` on.
    ///
    /// # Safety
    /// No two calls that may run at the same time overlap.
    #[expect(
        unsafe_code,
        reason = "tasks on several threads write disjoint parts of one buffer"
    )]
    pub(super) unsafe fn write(&self, first: usize, values: &[f32]) {
        assert!(
            first <= self.len && values.len() <= self.len - first,
            "a task writes outside"
        );
        // SAFETY: in bounds by the assertion, and nobody else writes there by the contract.
        unsafe {
            std::ptr::copy_nonoverlapping(values.as_ptr(), self.start.add(first), values.len());
        }
    }
}
