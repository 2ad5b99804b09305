#if canImport(CoreML)
import CoreML
import Foundation

/// A bundle's packages in Core ML: compiled once into a folder of the app's, opened on the compute units its manifest
/// names. A chunked UNet is several packages; `ComponentSession` runs them one after the other.
public final class CoreMLModels {
    private let bundle: ModelBundle
    private let compiled: URL
    /// In place of the manifest's hint, nil = as it says.
    public var units: MLComputeUnits?

    /// compiled: where .mlmodelc folders are kept, outside of any bundle. It is made when needed.
    public init(_ bundle: ModelBundle, compiled: URL) {
        (self.bundle, self.compiled) = (bundle, compiled)
    }

    /// Compiles what is not compiled yet, which takes minutes for a UNet on a phone. progress: packages done, of how many.
    public func compile(progress: (Int, Int) async -> Void) async throws {
        let variants = bundle.manifest.components.flatMap(\.variants)
        for (done, variant) in variants.enumerated() {
            await progress(done, variants.count)
            try Task.checkCancellation()
            let place = try place(variant)
            guard shipped(variant) == nil, !FileManager.default.fileExists(atPath: place.path) else { continue }
            let made = try await MLModel.compileModel(at: try package(variant))
            try FileManager.default.createDirectory(at: compiled, withIntermediateDirectories: true)
            try FileManager.default.moveItem(at: made, to: place)
        }
        await progress(variants.count, variants.count)
    }

    /// Opens a variant: what `ComponentSession` calls.
    public func open(_ variant: Variant) throws -> Call {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = try units ?? CoreMLModels.units(variant.computeUnits)
        let folder = try shipped(variant).map { try bundle.path($0).deletingLastPathComponent() } ?? place(variant)
        let model: MLModel
        do { model = try MLModel(contentsOf: folder, configuration: configuration) } catch {
            try? FileManager.default.removeItem(at: try place(variant))  // a newer system may not read what an older one compiled
            throw dataError("\(variant.files[0]) does not load (\(shown(error.localizedDescription)))", "a model this system reads",
                            "Open the model again to compile it anew")
        }
        return { inputs in try CoreMLModels.predict(model, inputs, variant) }
    }

    /// all, cpuOnly, cpuAndGPU, cpuAndNeuralEngine; "" is all.
    public static func units(_ hint: String) throws -> MLComputeUnits {
        let known: [String: MLComputeUnits] = [
            "": .all, "all": .all, "cpuOnly": .cpuOnly, "cpuAndGPU": .cpuAndGPU, "cpuAndNeuralEngine": .cpuAndNeuralEngine,
        ]
        if let found = known[hint] { return found }
        throw dataError("compute units '\(shown(hint))' in the manifest", "all, cpuOnly, cpuAndGPU, cpuAndNeuralEngine",
                        "Package the model again")
    }

    /// The .mlpackage folder of a variant: its first file lies at the top of it.
    private func package(_ variant: Variant) throws -> URL { try bundle.path(variant.files[0]).deletingLastPathComponent() }

    /// A file at the top of a .mlmodelc that the bundle brings (edgesd package --compiled).
    private func shipped(_ variant: Variant) -> String? {
        variant.files.first { $0.hasSuffix(".mlmodelc/model.mil") || $0.hasSuffix(".mlmodelc/coremldata.bin") }
    }

    /// Named by the contents, so that two bundles share nothing by accident.
    private func place(_ variant: Variant) throws -> URL {
        let hashes = bundle.manifest.files.filter { variant.files.contains($0.path) }.map(\.sha256).joined()
        return compiled.appendingPathComponent("\(Sha256.hex(hashes.utf8)).mlmodelc")
    }

    private static func predict(_ model: MLModel, _ inputs: [String: AnyArray], _ variant: Variant) throws -> [String: AnyArray] {
        let halves = Set(variant.inputs.filter { $0.dtype == "float16" }.map(\.name))  // what chunks tell each other
        let arrays = try Dictionary(uniqueKeysWithValues: inputs.map { ($0, try multiArray($1, half: halves.contains($0))) })
        let made = try model.prediction(from: try MLDictionaryFeatureProvider(dictionary: arrays))
        return try Dictionary(uniqueKeysWithValues: variant.outputs.map { spec -> (String, AnyArray) in
            guard let array = made.featureValue(for: spec.name)?.multiArrayValue else {
                throw dataError("the model gave no \(spec.name)", "what its manifest says", "Package the model again")
            }
            return (spec.name, .f32(try tensor(array, spec)))
        })
    }

    private static func multiArray(_ array: AnyArray, half: Bool) throws -> MLMultiArray {
        func filled<T>(_ values: [T], _ type: MLMultiArrayDataType) throws -> MLMultiArray {
            let made = try MLMultiArray(shape: array.shape.map { NSNumber(value: $0) }, dataType: type)
            made.withUnsafeMutableBytes { bytes, _ in values.withUnsafeBytes { bytes.copyMemory(from: $0) } }
            return made
        }
        switch array {
        #if arch(arm64)
        case .f32(let x) where half: return try filled(x.values.map { Float16($0) }, .float16)
        #endif
        case .f32(let x): return try filled(x.values, .float32)
        case .i32(let x): return try filled(x.values, .int32)
        case .i64(let x): return try filled(x.values.map { Int32(truncatingIfNeeded: $0) }, .int32)
        case .u8: throw requestError("bytes as a model's input", "numbers", "Pass floats")
        }
    }

    /// The values in C order, whatever strides and float type Core ML chose.
    private static func tensor(_ array: MLMultiArray, _ spec: TensorSpec) throws -> Tensor {
        guard array.shape.map(\.intValue) == spec.shape else {
            throw dataError("the model gave \(spec.name) of shape \(array.shape)", "\(spec.shape)", "Package the model again")
        }
        let dense = MLShapedArray<Float>(converting: array)
        return Tensor(spec.shape, dense.scalars)
    }
}
#endif
