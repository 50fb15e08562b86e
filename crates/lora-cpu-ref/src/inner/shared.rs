//! An output that several threads write, each in its own rectangles.
#![allow(unsafe_code)] // Rectangles of a strided buffer are disjoint, but not as slices.

use std::{marker::PhantomData, ops::Range};

use rayon::prelude::*;

/// An output that is divided into rectangles.
pub(super) struct Canvas<'a, T> {
    data: *mut T,
    len: usize,
    stride: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: a canvas is only reached through windows, and windows that exist at the same time never
// share an element (see `Grid::windows`), so threads write to disjoint memory of a `Send` type.
unsafe impl<T: Send> Sync for Canvas<'_, T> {}

/// The division of an output into rectangles of `row_step` by `col_step` values, smaller at the edges.
#[derive(Clone, Debug)]
pub(super) struct Grid {
    pub(super) rows: Range<usize>,
    pub(super) cols: usize,
    pub(super) row_step: usize,
    pub(super) col_step: usize,
    /// Minimum number of rectangles for one task; `None` runs all on the calling thread.
    pub(super) min_task: Option<usize>,
}

/// One rectangle of a canvas.
pub(super) struct Window<'a, T> {
    canvas: &'a Canvas<'a, T>,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
}

impl<'a, T: Send> Canvas<'a, T> {
    /// Row `m` of the canvas starts at `m * stride` of `data`.
    pub(super) fn new(data: &'a mut [T], stride: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), stride, owner: PhantomData }
    }

    /// Calls `body` for every rectangle of `grid`, in parallel if the grid allows it. Calls on the same
    /// thread share the scratch that `scratch` makes.
    ///
    /// Columns never exceed the stride.
    pub(super) fn paint<S>(
        &mut self,
        grid: Grid,
        scratch: impl Fn() -> S + Sync,
        body: impl Fn(&mut S, Window<'_, T>) + Sync,
    ) {
        let grid = self.disjoint(grid);
        let across = grid.cols.div_ceil(grid.col_step);
        let tasks = across * grid.rows.len().div_ceil(grid.row_step);
        let canvas = &*self;
        let one = |scratch: &mut S, task: usize| {
            let row = grid.rows.start + task / across * grid.row_step;
            let col = task % across * grid.col_step;
            let rows = row..grid.rows.end.min(row + grid.row_step);
            let cols = col..grid.cols.min(col + grid.col_step);
            body(scratch, Window { canvas, rows, cols });
        };
        match grid.min_task {
            Some(least) => (0..tasks)
                .into_par_iter()
                .with_min_len(least)
                .for_each_init(&scratch, |scratch, task| one(scratch, task)),
            None => {
                let mut scratch = scratch();
                (0..tasks).for_each(|task| one(&mut scratch, task));
            }
        }
    }

    /// `grid`, corrected so that its rectangles are disjoint in memory.
    fn disjoint(&self, grid: Grid) -> Grid {
        Grid {
            cols: grid.cols.min(self.stride),
            row_step: grid.row_step.max(1),
            col_step: grid.col_step.max(1),
            ..grid
        }
    }
}

impl<T> Window<'_, T> {
    /// The window's columns of row `m`; empty if the row is outside the window or the data.
    pub(super) fn row(&mut self, m: usize) -> &mut [T] {
        let first = m.saturating_mul(self.canvas.stride);
        let start = first.saturating_add(self.cols.start);
        let end = start.saturating_add(self.cols.len());
        if !self.rows.contains(&m) || end > self.canvas.len {
            return &mut [];
        }
        // SAFETY: `start..end` is inside the canvas's data, which is borrowed mutably for as long
        // as the canvas lives. Windows of one `paint` differ in their columns, which lie within one
        // stride (`disjoint`), or in their rows; two rows of one window cannot be held at once
        // because of `&mut self`. So nothing else refers to this memory.
        unsafe { std::slice::from_raw_parts_mut(self.canvas.data.add(start), self.cols.len()) }
    }
}
