//! Convolutions and their pullbacks, some images at a time.

use super::{DTYPES, cast, element, single};
use crate::field::ops::cuda::arguments::Windows;
use crate::field::ops::cuda::convolution::Convolution;
use crate::field::ops::cuda::host::{Buffer, Host};
use crate::field::ops::cuda::sums::Sum;
use crate::field::ops::gradcheck::{distance, noise};
use candle_core::{DType, Module, Tensor, Var};
use candle_nn::Conv2dConfig;

#[test]
fn convolutions_are_those_of_the_cpu() {
    let Some(host) = Host::new() else { return };
    let configs = [(1, 1, 1, 1), (0, 1, 1, 1), (1, 2, 1, 1), (2, 1, 2, 1), (1, 2, 1, 2), (0, 3, 1, 4), (3, 2, 2, 2)];
    for ((padding, stride, dilation, groups), (dtype, bound)) in configs.iter().flat_map(|c| DTYPES.map(|d| (*c, d))) {
        for (height, width, kernel) in [(5, 5, (3, 3)), (6, 7, (3, 2)), (5, 8, (1, 3)), (9, 6, (3, 3))] {
            let (images, channels, outputs) = (5, 4, 8);
            let config = Conv2dConfig { padding, stride, dilation, groups, cudnn_fwd_algo: None };
            let x = cast(&noise(&[images, channels, height, width], 1), dtype);
            let weight = cast(&noise(&[outputs, channels / groups, kernel.0, kernel.1], 2), dtype);
            let wide = |x: &Tensor| Var::from_tensor(&cast(x, DType::F64)).unwrap();
            let (exact_x, exact_weight) = (wide(&x), wide(&weight));
            let layer = crate::ops::Conv2d::new(exact_weight.as_tensor().clone(), None, config);
            let exact = layer.forward(&exact_x).unwrap();
            let (_, _, out_height, out_width) = exact.dims4().unwrap();
            let grad = cast(&noise(exact.dims(), 3), dtype);
            let convolution = Convolution {
                element: element(dtype),
                windows: Windows {
                    from: 0,
                    to: 0,
                    images: images as u32,
                    channels: channels as u32,
                    height: height as u32,
                    width: width as u32,
                    kernel_height: kernel.0 as u32,
                    kernel_width: kernel.1 as u32,
                    out_height: out_height as u32,
                    out_width: out_width as u32,
                    step: stride as u32,
                    padding: padding as u32,
                    dilation: dilation as u32,
                },
                outputs,
                groups,
            };
            let buffers = [&x, &weight, &grad].map(Buffer::of);
            let (y, for_x) = (Buffer::new(exact.elem_count() * 4), Buffer::new(x.elem_count() * 4));
            let for_weight = Buffer::of(&single(&[0.0], weight.elem_count()));
            // SAFETY: the buffers have the shapes that the convolution says.
            unsafe {
                convolution.value(&host, buffers[0].at(), buffers[1].at(), y.at()).unwrap();
                convolution.pull_input(&host, buffers[2].at(), buffers[1].at(), for_x.at()).unwrap();
                let sum = Sum::plain(for_weight.at());
                convolution.pull_weight(&host, buffers[0].at(), buffers[2].at(), sum).unwrap();
            }
            let grads = (&exact * cast(&grad, DType::F64)).unwrap().sum_all().unwrap().backward().unwrap();
            let label = format!("{config:?} {height}x{width} {kernel:?} {dtype:?}");
            let near = |got: Tensor, exact: &Tensor, bound: f64| assert!(distance(&got, exact) < bound, "{label}");
            near(y.tensor(dtype, exact.dims()), &exact, bound);
            near(for_x.tensor(dtype, x.dims()), grads.get(&exact_x).unwrap(), 2.0 * bound);
            near(for_weight.tensor(DType::F32, weight.dims()), grads.get(&exact_weight).unwrap(), 2e-6);
        }
    }
}
