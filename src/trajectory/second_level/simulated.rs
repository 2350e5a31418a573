//! A device that copies as late as it may, or at once, and says what would have gone wrong.

use super::beside::{Movers, Moves};
use super::line::{Lane, Like, Line};
use crate::error::Result;
use candle_core::{Device, Tensor};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

/// A CPU that is taken for a device with a memory of its own.
#[derive(Clone, Debug, Default)]
pub(crate) struct Simulated(Arc<Mutex<World>>);

#[derive(Debug, Default)]
struct World {
    /// Whether copies are made when they are asked for; else when somebody waits for them.
    eager: bool,
    /// What was asked for, in order.
    log: Vec<String>,
    /// Copies that have not been made.
    queue: VecDeque<Copy>,
    /// Copies that were asked for and made.
    asked: usize,
    made: usize,
    buffers: usize,
    rooms: usize,
    wrong: Vec<String>,
    /// Copies from now until one fails.
    fails_after: Option<usize>,
}

#[derive(Debug)]
enum Copy {
    Out(Tensor, Arc<Bytes>),
    In(Arc<Bytes>, Tensor, usize),
}

#[derive(Debug)]
struct Bytes(usize, Mutex<Vec<u8>>);

impl World {
    /// Makes the copies before `mark`.
    fn make(&mut self, mark: usize) {
        while self.made < mark {
            let Some(copy) = self.queue.pop_front() else { return };
            self.made += 1;
            match copy {
                Copy::Out(x, to) => *to.1.lock().unwrap() = safetensors::View::data(&&x).into_owned(),
                Copy::In(from, room, _) => {
                    let (bytes, flat) = (from.1.lock().unwrap(), room.flatten_all().unwrap());
                    let x = Tensor::from_raw_buffer(&bytes, room.dtype(), &[flat.elem_count()], &Device::Cpu).unwrap();
                    flat.slice_set(&x, 0, 0).unwrap();
                }
            }
        }
    }

    fn ask(&mut self, what: String, copy: Copy) -> Result<()> {
        self.log.push(what);
        if self.fails_after.as_mut().is_some_and(|left| std::mem::replace(left, left.wrapping_sub(1)) == 0) {
            self.fails_after = None;
            return Err(candle_core::Error::Msg("a copy has failed".into()).into());
        }
        self.queue.push_back(copy);
        self.asked += 1;
        if self.eager {
            self.make(self.asked);
        }
        Ok(())
    }
}

impl Simulated {
    pub(crate) fn new(eager: bool) -> Self {
        Self(Arc::new(Mutex::new(World { eager, ..World::default() })))
    }

    /// What moves entries of this device.
    pub(crate) fn movers(&self) -> Movers {
        Movers::of_test(self.mover())
    }

    pub(super) fn mover(&self) -> Arc<dyn Moves> {
        Arc::new(Line::new(self.clone()))
    }

    /// What would have gone wrong, and is forgotten.
    pub(crate) fn wrong(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().wrong)
    }

    /// What was asked for since it was asked last.
    pub(super) fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().log)
    }

    /// Buffers of the host, ever.
    pub(crate) fn buffers(&self) -> usize {
        self.0.lock().unwrap().buffers
    }

    /// Copies that were asked for.
    pub(crate) fn copies(&self) -> usize {
        self.0.lock().unwrap().asked
    }

    /// Those that were made.
    pub(super) fn made(&self) -> usize {
        self.0.lock().unwrap().made
    }

    /// Those that were not.
    pub(super) fn pending(&self) -> usize {
        self.0.lock().unwrap().queue.len()
    }

    /// So many copies succeed, then one does not.
    pub(super) fn fail_after(&self, copies: usize) {
        self.0.lock().unwrap().fails_after = Some(copies);
    }
}

/// Memory of the host; it knows whether a copy uses it when it is freed.
#[derive(Debug)]
pub(super) struct Buffer(Arc<Bytes>, Simulated);

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut world = self.1.0.lock().unwrap();
        let uses = |copy: &Copy| matches!(copy, Copy::Out(_, bytes) | Copy::In(bytes, ..) if bytes.0 == self.0.0);
        if world.queue.iter().any(uses) {
            world.wrong.push(format!("buffer {} is freed while it is copied", self.0.0));
        }
    }
}

/// Memory of the device, all bits set until something was copied into it.
#[derive(Debug)]
pub(super) struct Room(usize, Tensor, Simulated);

impl Room {
    fn check(&self, what: &str) {
        let mut world = self.2.0.lock().unwrap();
        if world.queue.iter().any(|copy| matches!(copy, Copy::In(_, _, room) if *room == self.0)) {
            world.wrong.push(format!("room {} is {what} before its copy is over", self.0));
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.check("let go");
    }
}

impl Lane for Simulated {
    type Buffer = Buffer;
    type Room = Room;
    type Mark = usize;

    fn serves(&self, device: &Device) -> bool {
        device.is_cpu()
    }

    fn takes(&self, x: &Tensor) -> bool {
        x.is_contiguous()
    }

    fn buffer(&self, bytes: usize) -> Result<Buffer> {
        let mut world = self.0.lock().unwrap();
        world.buffers += 1;
        Ok(Buffer(Arc::new(Bytes(world.buffers, Mutex::new(vec![0xFF; bytes]))), self.clone()))
    }

    fn room(&self, like: &Like) -> Result<Room> {
        let mut world = self.0.lock().unwrap();
        world.rooms += 1;
        let number = world.rooms;
        world.log.push(format!("room {number}"));
        let x = Tensor::from_raw_buffer(&vec![0xFF; like.bytes()], like.dtype, like.shape.dims(), &Device::Cpu)?;
        Ok(Room(number, x, self.clone()))
    }

    fn after_compute(&self) -> Result<()> {
        self.0.lock().unwrap().log.push("after what is computed".into());
        Ok(())
    }

    fn put(&self, from: &Tensor, to: &mut Buffer) -> Result<()> {
        let copy = Copy::Out(from.clone(), to.0.clone());
        self.0.lock().unwrap().ask(format!("to buffer {}", to.0.0), copy)
    }

    fn fetch(&self, from: &Buffer, to: &mut Room) -> Result<()> {
        let copy = Copy::In(from.0.clone(), to.1.clone(), to.0);
        self.0.lock().unwrap().ask(format!("from buffer {} to room {}", from.0.0, to.0), copy)
    }

    fn mark(&self) -> Result<usize> {
        let mut world = self.0.lock().unwrap();
        let asked = world.asked;
        world.log.push(format!("mark {asked}"));
        Ok(asked)
    }

    fn compute_waits(&self, mark: &usize) -> Result<()> {
        let mut world = self.0.lock().unwrap();
        world.log.push(format!("what is computed waits for {mark}"));
        world.make(*mark);
        Ok(())
    }

    fn arrived(&self, room: Room, _: &Like) -> Tensor {
        room.check("read");
        room.1.clone()
    }

    fn finish(&self) {
        let mut world = self.0.lock().unwrap();
        world.log.push("all copies are waited for".into());
        let asked = world.asked;
        world.make(asked);
    }
}
