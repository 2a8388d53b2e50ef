//! How much of the forwarder's work guests may have at once: so much all of them, less those of one
//! device, and less each of them. A guest that floods takes its own part.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Questions take a descriptor each, and connections two: all of them fit the 1024 that a process
/// has, with what else it needs.
const QUESTIONS: Limits = Limits {
    all: 384,
    device: 96,
    guest: 48,
};
const CONNECTIONS: Limits = Limits {
    all: 64,
    device: 16,
    guest: 8,
};

#[derive(Clone, Copy, Debug)]
struct Limits {
    all: usize,
    device: usize,
    guest: usize,
}

// With 1024 descriptors, tables, programs and sockets of the process's own have some 400.
const _: () = assert!(QUESTIONS.all + 2 * CONNECTIONS.all <= 600);

/// The room of an instance.
#[derive(Debug)]
pub(super) struct Rooms {
    pub questions: Arc<Room>,
    pub connections: Arc<Room>,
}

impl Default for Rooms {
    fn default() -> Self {
        Self {
            questions: Room::new(QUESTIONS),
            connections: Room::new(CONNECTIONS),
        }
    }
}

/// Room for one kind of work.
#[derive(Debug)]
pub(super) struct Room {
    limits: Limits,
    /// By the device's index and the guest's address. Who has nothing is not in it.
    taken: Mutex<HashMap<(u32, IpAddr), usize>>,
}

impl Room {
    fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            taken: Mutex::default(),
        })
    }

    /// A place for a guest, if there is one for it.
    pub fn enter(self: &Arc<Self>, device: u32, guest: IpAddr) -> Option<Place> {
        let mut taken = self.taken();
        let all: usize = taken.values().sum();
        let of_device = taken
            .iter()
            .filter(|((other, _), _)| *other == device)
            .map(|(_, count)| count)
            .sum::<usize>();
        let of_guest = taken.get(&(device, guest)).copied().unwrap_or(0);
        let has_room =
            all < self.limits.all && of_device < self.limits.device && of_guest < self.limits.guest;
        if !has_room {
            return None;
        }
        taken.insert((device, guest), of_guest + 1);
        Some(Place {
            room: self.clone(),
            holder: (device, guest),
        })
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<(u32, IpAddr), usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A guest's place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    room: Arc<Room>,
    holder: (u32, IpAddr),
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.room.taken();
        if let Some(count) = taken.get_mut(&self.holder) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.holder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(number: u8) -> IpAddr {
        [10, 0, 0, number].into()
    }

    fn fill(room: &Arc<Room>, device: u32, guest: IpAddr) -> Vec<Place> {
        std::iter::from_fn(|| room.enter(device, guest)).collect()
    }

    #[test]
    fn a_guest_takes_its_own_part_and_gives_it_back() {
        let room = Room::new(QUESTIONS);
        let places = fill(&room, 1, guest(1));
        assert_eq!(places.len(), QUESTIONS.guest);
        assert!(
            room.enter(1, guest(2)).is_some(),
            "there is room for another"
        );
        drop(places);
        assert!(room.enter(1, guest(1)).is_some());
        assert!(room.taken().is_empty(), "it remembers who is gone");
    }

    #[test]
    fn guests_that_are_made_up_take_their_devices_part() {
        let room = Room::new(QUESTIONS);
        let places: Vec<_> = (0..20).flat_map(|it| fill(&room, 1, guest(it))).collect();
        assert_eq!(places.len(), QUESTIONS.device);
        assert!(room.enter(2, guest(1)).is_some(), "another device has none");
    }

    #[test]
    fn all_devices_together_have_an_end() {
        let room = Room::new(QUESTIONS);
        let places: Vec<_> = (0..100)
            .flat_map(|device| fill(&room, device, guest(1)))
            .collect();
        assert_eq!(places.len(), QUESTIONS.all);
    }
}
