//! A hash table with a capacity, whose values are shared as the kernel's are.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    hash::Hash,
    ptr::NonNull,
};

use tapnat_common::nat::Insert;

/// Values stay where they are until the table goes, also when they are removed:
/// a program of the kernel may look at a removed one until it ends.
pub struct Table<K, V> {
    entries: RefCell<HashMap<K, NonNull<V>>>,
    every: RefCell<Vec<NonNull<V>>>,
    pub capacity: Cell<usize>,
}

impl<K: Copy + Eq + Hash, V: Copy> Table<K, V> {
    pub fn new() -> Self {
        Self {
            entries: RefCell::default(),
            every: RefCell::default(),
            capacity: Cell::new(usize::MAX),
        }
    }

    /// The value in place.
    #[expect(clippy::mut_from_ref, reason = "values lie elsewhere, as in a BPF map")]
    pub fn get(&self, key: &K) -> Option<&mut V> {
        let value = *self.entries.borrow().get(key)?;
        // SAFETY: it came from a box that is freed with the table. Callers are
        // those of `Tables`, which expect that others have it, too.
        Some(unsafe { &mut *value.as_ptr() })
    }

    /// A copy of the value.
    pub fn copy(&self, key: &K) -> Option<V> {
        self.get(key).map(|value| *value)
    }

    /// Inserts what is not there yet.
    pub fn insert(&self, key: &K, value: &V) -> Insert {
        if self.entries.borrow().contains_key(key) {
            return Insert::Exists;
        }
        self.set(key, value)
    }

    /// Inserts or replaces.
    pub fn set(&self, key: &K, value: &V) -> Insert {
        let mut entries = self.entries.borrow_mut();
        if entries.len() >= self.capacity.get() && !entries.contains_key(key) {
            return Insert::Full;
        }
        let value = NonNull::from(Box::leak(Box::new(*value)));
        self.every.borrow_mut().push(value);
        entries.insert(*key, value);
        Insert::Done
    }

    pub fn remove(&self, key: &K) -> bool {
        self.entries.borrow_mut().remove(key).is_some()
    }

    pub fn len(&self) -> usize {
        self.entries.borrow().len()
    }

    /// Copies of all entries.
    pub fn all(&self) -> Vec<(K, V)> {
        let keys: Vec<K> = self.entries.borrow().keys().copied().collect();
        keys.into_iter()
            .filter_map(|key| Some((key, self.copy(&key)?)))
            .collect()
    }

    /// Leaves no room for another entry.
    pub fn fill(&self) {
        self.capacity.set(self.len());
    }
}

impl<K, V> Drop for Table<K, V> {
    fn drop(&mut self) {
        for value in self.every.get_mut().drain(..) {
            // SAFETY: each came from a box and is here once.
            drop(unsafe { Box::from_raw(value.as_ptr()) });
        }
    }
}
